"""Runs in an environment that has vLLM for CPUs, without this package: loads exported checkpoints.

python vllm_worker.py IDS RESULTS FOLDER…

IDS is a JSON list of tokens. RESULTS, JSON, gets of each folder whether its weights were loaded, and the logarithmic
probability of each token but the first, or what vLLM says against computing them.
"""

import json
import logging
import sys

from vllm import LLM, SamplingParams
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

OPTIONS = {
    "skip_tokenizer_init": True,
    "enforce_eager": True,
    "dtype": "bfloat16",
    "max_model_len": 64,
    "disable_log_stats": True,
    "load_format": "safetensors",
}


def of_tokens(folder, ids):
    model = LLM(folder, **OPTIONS)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, prompt_logprobs=0, detokenize=False)
    (output,) = model.generate([{"prompt_token_ids": ids}], sampling, use_tqdm=False)
    cache = model.llm_engine.vllm_config.cache_config.cache_dtype
    found = [each[token].logprob for each, token in zip(output.prompt_logprobs[1:], ids[1:], strict=True)]
    return {"logprobs": found, "generated": len(output.outputs[0].token_ids), "cache": cache}


@register_model_loader("safetensors")
class Loader(DefaultModelLoader):
    """Remembers that a model has got all of its weights, of which vLLM itself is strict."""

    done = False

    def load_weights(self, model, model_config):
        super().load_weights(model, model_config)
        Loader.done = True


if __name__ == "__main__":
    logging.disable(logging.INFO)
    tokens, results, *folders = sys.argv[1:]
    with open(tokens, encoding="utf-8") as file:
        ids = json.load(file)
    made = {}
    for folder in folders:
        Loader.done = False
        try:
            made[folder] = of_tokens(folder, ids)
        except Exception as error:  # what it cannot run is a result as well
            made[folder] = {"error": f"{type(error).__name__}: {error}"}
        made[folder]["loaded"] = Loader.done
        with open(results, "w", encoding="utf-8") as file:
            json.dump(made, file)
