"""LoRA on a converted model with Trainer: checkpointing, accumulation, resuming; adapters saved by themselves."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from optimum_fp8 import FP8Config, FP8StateError, convert
from optimum_fp8.modules import fp8_modules

SIZES = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
ROWS = [{"input_ids": row, "labels": row} for row in torch.randint(0, 32, (16, 8), generator=torch.manual_seed(0))]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("base")
    LlamaForCausalLM(LlamaConfig(**SIZES)).to(torch.bfloat16).save_pretrained(folder)
    return folder


def loaded(base):
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=FP8Config(activation_scheme="dynamic"))


def adapted(model, **options):
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(target_modules="all-linear", r=4, task_type="CAUSAL_LM", **options))


def trainer(model, folder, **options):
    arguments = {
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
    }
    arguments |= {"output_dir": str(folder), "use_cpu": True, "bf16": True, "report_to": [], "disable_tqdm": True}
    arguments |= {"save_strategy": "no", "weight_decay": 0.1, "seed": 0}
    return Trainer(model, TrainingArguments(**arguments | options), train_dataset=ROWS, eval_dataset=ROWS)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if "lora_" in name}


def distance(one, other) -> float:
    return max(float((each - other[name]).norm() / each.norm()) for name, each in one.items())


def trained(base, folder, resume=None, **options):
    run = trainer(adapted(loaded(base)), folder, **options)
    run.train(resume_from_checkpoint=resume)
    return weights(run.model), run


def test_checkpointing_and_accumulation_train_the_same_and_the_base_stays(base, tmp_path):
    expected, run = trained(base, tmp_path)
    codes = {name: each.codes.view(torch.uint8) for name, each in fp8_modules(loaded(base)).items()}
    held = {name.removeprefix("base_model.model."): each for name, each in fp8_modules(run.model).items()}
    for name, module in held.items():
        assert torch.equal(module.codes.view(torch.uint8), codes[name.removesuffix(".base_layer")])
    assert run.evaluate()["eval_loss"] < trainer(loaded(base), tmp_path).evaluate()["eval_loss"]
    ways = [{"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}} for reentrant in (True, False)]
    ways = [{"gradient_checkpointing": True, **way} for way in ways]
    for way in ways:
        assert distance(trained(base, tmp_path, **way)[0], expected) < 1e-6, way
    halves = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    assert distance(trained(base, tmp_path, **halves)[0], expected) < 0.05


def test_it_goes_on_from_a_checkpoint(base, tmp_path):
    expected, _ = trained(base, tmp_path, save_strategy="steps", save_steps=2)
    found, _ = trained(base, tmp_path, resume=str(tmp_path / "checkpoint-2"))
    assert distance(found, expected) < 1e-6
    with safe_open(tmp_path / "checkpoint-2" / "adapter_model.safetensors", "pt") as file:
        assert all("lora_" in name for name in file.keys()), "nothing of the base"  # noqa: SIM118


@torch.no_grad()
def test_adapters_are_saved_and_loaded_by_themselves_onto_either_base(base, tmp_path):
    x = {"input_ids": ROWS[0]["input_ids"][None]}
    model = adapted(loaded(base), init_lora_weights=False).eval()
    model.add_adapter("other", LoraConfig(target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM"))
    plain, default = loaded(base)(**x).logits, model(**x).logits
    with model.disable_adapter():
        assert torch.equal(model(**x).logits, plain)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(loaded(base), tmp_path).eval()
    assert torch.equal(again(**x).logits, default) and not torch.equal(default, plain)
    again.load_adapter(tmp_path / "other", "other")
    for each in (model, again):
        each.set_adapter("other")
    assert torch.equal(again(**x).logits, model(**x).logits) and not torch.equal(model(**x).logits, default)
    generated = [each.generate(**x, max_new_tokens=4, min_new_tokens=4, do_sample=False) for each in (again, model)]
    assert torch.equal(*generated) and generated[0].shape == (1, 12)
    high = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path).eval()
    assert float((high(**x).logits - default).norm() / default.norm()) < 0.1


def test_trainer_refuses_full_fine_tuning_and_still_evaluates(base, tmp_path):
    run = trainer(loaded(base), tmp_path)
    with pytest.raises(FP8StateError, match="get_peft_model"):
        run.train()
    assert run.evaluate()["eval_loss"] > 0 and run.predict(ROWS).predictions.shape == (16, 8, 32)


def test_a_model_converted_by_hand_and_a_copy_of_it_take_adapters(base):
    model = convert(AutoModelForCausalLM.from_pretrained(base), FP8Config(activation_scheme="dynamic"))
    for each in (adapted(copy.deepcopy(model)), adapted(model)):
        each(**{name: row[None] for name, row in ROWS[0].items()}).loss.backward()
        assert all(p.grad is not None for p in each.parameters() if p.requires_grad)
