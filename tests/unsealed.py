"""Records without digests, as older checkpoints have them: for tests of what else refuses tensors that were edited."""

import json


def unsealed(metadata: dict[str, str] | None) -> dict[str, str]:
    """The metadata of a file, without what its record says of the bytes of each tensor."""
    metadata = dict(metadata or {})
    if "optimum_fp8" in metadata:
        record = json.loads(metadata["optimum_fp8"])
        kept = {key: value for key, value in record.items() if key not in ("save", "crc32", "files", "record")}
        metadata["optimum_fp8"] = json.dumps(kept)
    return metadata
