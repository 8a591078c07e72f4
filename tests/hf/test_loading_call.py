"""The tokenizer for calibration comes from where the model comes from, and with the same arguments."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedTokenizerFast

from optimum_fp8 import FP8Config, calibrate
from optimum_fp8.errors import FP8CalibrationError, FP8NotAvailableError
from optimum_fp8.hf.loading_call import loading_origin
from optimum_fp8.lifecycle import Origin
from optimum_fp8.lifecycle.state import state_of

from .conftest import VOCABULARY, llama

TEXTS = ["hello world", "good bye"]


def tokenizer_that_adds(shift: int) -> PreTrainedTokenizerFast:
    """One token a byte, numbered from `shift` on: tokenizers of different places give different ids."""
    vocabulary = {chr(code): (code + shift) % VOCABULARY for code in range(VOCABULARY)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE(vocabulary, [], unk_token=chr(0))))


@pytest.fixture
def places(tmp_path) -> Path:
    """A folder whose tokenizer adds 1, and a sub-folder whose adds 2; both hold the same model."""
    for number, folder in enumerate([tmp_path / "repository", tmp_path / "repository" / "inner" / "model"], 1):
        llama().save_pretrained(folder)
        tokenizer_that_adds(number).save_pretrained(folder)
    return tmp_path / "repository"


@pytest.fixture
def hub(places, tmp_path) -> Path:
    """A cache of the hub with the same repository: main is the folder, v2 what is in its sub-folder."""
    cache, repository = tmp_path / "hub", tmp_path / "hub" / "models--someone--tiny"
    for name, source in {"main": places, "v2": places / "inner" / "model"}.items():
        commit = name.encode().hex().ljust(40, "0")
        shutil.copytree(source, repository / "snapshots" / commit)
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / name).write_text(commit)
    return cache


def data_seen(model) -> str:
    return state_of(model).measurements.data


def seen_with(shift: int, folder: Path) -> str:
    config = FP8Config(dataset=TEXTS, tokenizer=tokenizer_that_adds(shift))
    return data_seen(AutoModelForCausalLM.from_pretrained(folder, quantization_config=config))


@pytest.mark.core
@pytest.mark.parametrize("made_by", [AutoModelForCausalLM, LlamaForCausalLM])
def test_the_sub_folder(places, made_by):
    config = FP8Config(dataset=TEXTS)
    inner = made_by.from_pretrained(places, subfolder="inner/model", quantization_config=config)
    outer = made_by.from_pretrained(places, quantization_config=config)
    assert data_seen(inner) == seen_with(2, places) != data_seen(outer) == seen_with(1, places)


@pytest.mark.core
def test_the_revision_in_a_cache_of_ones_own(hub, places):
    options = {"cache_dir": hub, "local_files_only": True, "quantization_config": FP8Config(dataset=TEXTS)}
    for revision, shift in {"main": 1, "v2": 2}.items():
        model = AutoModelForCausalLM.from_pretrained("someone/tiny", revision=revision, **options)
        assert data_seen(model) == seen_with(shift, places)


@pytest.mark.parametrize("mode", ["MEASURE", "AUTO"])
def test_a_model_in_measuring_state_remembers(places, tmp_path, mode):
    config = FP8Config(mode=mode, activation_scheme="static", dump_stats_path=str(tmp_path / "ranges" / "x"))
    model = AutoModelForCausalLM.from_pretrained(places, subfolder="inner/model", quantization_config=config)
    calibrate(model, FP8Config(dataset=TEXTS))
    assert data_seen(model) == seen_with(2, places)


@pytest.mark.core
def test_every_argument_arrives(places, monkeypatch):
    given = {
        "subfolder": "inner/model",
        "revision": "v9",
        "token": "hf_token",
        "cache_dir": "/nowhere",
        "proxies": {"https": "proxy"},
        "force_download": True,
        "local_files_only": True,
        "trust_remote_code": True,
        "code_revision": "v8",
    }
    seen = []

    def from_pretrained(name, **arguments):
        seen.append((name, arguments))
        return tokenizer_that_adds(0)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    for tokenizer in (None, "elsewhere"):
        config = FP8Config(dataset=TEXTS, tokenizer=tokenizer)
        AutoModelForCausalLM.from_pretrained(places, quantization_config=config, **given)
    (place, arguments), (elsewhere, general) = seen
    assert (place, elsewhere) == (str(places), "elsewhere")
    assert {name: arguments[name] for name in given} == given
    assert general.items() < given.items() and not {"subfolder", "revision", "code_revision"} & set(general)


CODE = """
from transformers import PreTrainedTokenizerFast

class Shifting(PreTrainedTokenizerFast):
    pass
"""


def test_code_of_the_tokenizer_is_run_if_the_user_said_so(places):
    (places / "tokenization_shifting.py").write_text(CODE)
    path = places / "tokenizer_config.json"
    said = json.loads(path.read_text()) | {"tokenizer_class": "Shifting"}
    said["auto_map"] = {"AutoTokenizer": [None, "tokenization_shifting.Shifting"]}
    path.write_text(json.dumps(said))
    config = FP8Config(dataset=TEXTS)
    trusting = AutoModelForCausalLM.from_pretrained(places, trust_remote_code=True, quantization_config=config)
    assert data_seen(trusting) == seen_with(1, places)
    with pytest.raises(FP8CalibrationError, match=r"no tokenizer at .*pass tokenizer="):
        AutoModelForCausalLM.from_pretrained(places, trust_remote_code=False, quantization_config=config)


def test_an_error_names_the_place(places):
    for path in (places / "inner" / "model").glob("tokenizer*"):
        path.unlink()
    with pytest.raises(FP8CalibrationError, match=r"no tokenizer at '.*repository', subfolder='inner/model' \("):
        AutoModelForCausalLM.from_pretrained(
            places, subfolder="inner/model", quantization_config=FP8Config(dataset=TEXTS)
        )


def test_outside_of_from_pretrained_the_model_says_where_it_is_from(places):
    model = AutoModelForCausalLM.from_pretrained(places)
    assert loading_origin(model) == Origin(str(places)) and loading_origin(llama()) == Origin("")


class Zero3:
    """What DeepSpeed's configuration says of itself, while `TrainingArguments(deepspeed=…)` is there."""

    def is_zero3(self):
        return True


@pytest.fixture
def zero3():
    from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

    config = Zero3()
    set_hf_deepspeed_config(config)
    yield config
    unset_hf_deepspeed_config()


@pytest.mark.parametrize("keys", [{"activation_scheme": "dynamic"}, {"mode": "MEASURE"}], ids=str)
def test_zero_3_is_refused(save, zero3, keys):
    with pytest.raises(FP8NotAvailableError, match=r"ZeRO-3.*stage 3.*ZeRO-2, DDP or FSDP2.*one process"):
        AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=FP8Config(**keys))


def test_zero_3_is_refused_for_fp8_checkpoints_and_for_training(save, tmp_path, request):
    from transformers import Trainer, TrainingArguments

    config = FP8Config(activation_scheme="dynamic")
    model = AutoModelForCausalLM.from_pretrained(save(llama()), quantization_config=config)
    model.save_pretrained(tmp_path / "fp8")
    request.getfixturevalue("zero3")
    with pytest.raises(FP8NotAvailableError, match="ZeRO-3"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    with pytest.raises(FP8NotAvailableError, match="ZeRO-3"):
        Trainer(model, TrainingArguments(str(tmp_path), report_to=[], use_cpu=True))
