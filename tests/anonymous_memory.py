"""A process's own memory while it works, for scripts that tests run in processes of their own.

Files that are mapped do not count: the system can drop their pages. So it is RssAnon, which has no maximum of its own.
And glibc is told to give what is freed back at once: how much it keeps depends on what was allocated before.
"""

WATCHED = """
import ctypes, threading, time

M_MMAP_THRESHOLD = -3  # of malloc.h; set once, it no longer grows with what is freed
ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**20)

class Watched:
    def __enter__(self):
        self.before = self.peak = self.now()
        self._done = threading.Event()
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def __exit__(self, *error):
        self._done.set()
        self._sampler.join()

    @staticmethod
    def now():
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))

    def _sample(self):
        while not self._done.is_set():
            self.peak = max(self.peak, self.now())
            time.sleep(0.001)
"""
