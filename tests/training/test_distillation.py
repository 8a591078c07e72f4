"""Distillation: the loss against torch's KL divergence in float64, and what Trainer gives and gets."""

from __future__ import annotations

import pytest
import torch
from tiny_models import tiny_llama
from torch.distributions import Categorical, kl_divergence
from transformers import Trainer, TrainingArguments

from optimum_fp8 import FP8Config, convert, prepare
from optimum_fp8.errors import FP8StateError
from optimum_fp8.training import Distillation, distillation_loss


def test_the_loss_is_the_divergence_of_the_softened_distributions():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 5, 7).requires_grad_(), torch.randn(2, 5, 7).requires_grad_()
    weights = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 2]])
    found = distillation_loss(student, teacher, 2.0, weights)
    each = kl_divergence(Categorical(logits=teacher.double() / 2), Categorical(logits=student.double() / 2)) * 4
    torch.testing.assert_close(found.double(), (each * weights).sum() / 5)
    torch.testing.assert_close(distillation_loss(student, teacher).double(), _divergence(student, teacher).mean())
    found.backward()
    assert teacher.grad is None and not student.grad[0, 2].any() and student.grad[0, 1].any()


def _divergence(student, teacher):
    return kl_divergence(Categorical(logits=teacher.double()), Categorical(logits=student.double()))


def test_nothing_counts_where_no_weight_does():
    assert distillation_loss(torch.randn(2, 3), torch.randn(2, 3), weights=torch.zeros(2)) == 0


def test_only_labels_of_next_tokens_count():
    torch.manual_seed(0)
    student, teacher = tiny_llama().float().train(), tiny_llama().float()
    teacher.lm_head.weight.data.mul_(2)
    ids = torch.arange(3, 15).reshape(2, 6)
    labels = ids.clone()
    labels[0, 3:] = labels[1, :5] = -100
    loss = Distillation(student, teacher)
    outputs = student(input_ids=ids, labels=ids)
    found = loss(outputs, labels)
    with torch.no_grad():
        each = _divergence(outputs.logits, teacher(input_ids=ids).logits)
    expected = (each[0, :2].sum() + each[1, 4]) / 3
    torch.testing.assert_close(found.double(), expected)
    outputs = student(input_ids=ids)
    torch.testing.assert_close(loss(outputs, labels, num_items_in_batch=6), found / 2)
    with pytest.raises(FP8StateError, match="was not called since the last loss"):
        loss(outputs, labels)
    assert loss_in_evaluation(student, loss, ids) == 0
    loss.remove()
    assert not student._forward_pre_hooks


@torch.no_grad()
def loss_in_evaluation(student, loss, ids):
    return float(loss(student.eval()(input_ids=ids), ids))


@pytest.mark.slow
def test_trainer_brings_a_student_closer_to_its_teacher(tmp_path):
    torch.manual_seed(0)
    teacher, student = tiny_llama().float().eval(), tiny_llama().float()
    student.load_state_dict(teacher.state_dict())
    config = FP8Config(fake_quant=True, fp8_config="E5M2", scale_method="unit_scale", target="cpu")
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    prepare(student, config)
    ids = torch.randint(3, 60, (16, 8))
    data = [{"input_ids": row, "labels": row} for row in ids]

    @torch.no_grad()
    def divergence():
        return float(_divergence(student.eval()(input_ids=ids).logits, teacher(input_ids=ids).logits).mean())

    before = divergence()
    options = TrainingArguments(
        tmp_path, max_steps=20, learning_rate=1e-2, report_to=[], use_cpu=True, save_strategy="no"
    )
    Trainer(student, options, train_dataset=data, compute_loss_func=Distillation(student, teacher)).train()
    assert divergence() < 0.5 * before
    convert(student)
    assert divergence() < 0.6 * before
