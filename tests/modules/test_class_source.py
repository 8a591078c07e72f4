"""The syntax tree of a class: its own source, found for classes wherever they stand, None where there is none."""

import ast

import pytest
from torch import nn
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaMLP

from optimum_fp8.modules.class_source import class_tree


def methods(cls):
    return [node.name for node in ast.walk(class_tree(cls)) if isinstance(node, ast.FunctionDef)]


class Base(nn.Module):
    def forward(self, x):
        return self.of_base(x)


class Derived(Base):
    """Text before
    the first method, indented otherwise."""

    def other(self, x):
        return self.of_derived(x)


def test_only_its_own_source_counts():
    assert methods(Base) == ["forward"] and methods(Derived) == ["other"]
    assert class_tree(Derived).body[0].name == "Derived"


def test_a_class_inside_a_function():
    class Inside(nn.Module):
        def forward(self, x):
            text = """
not indented"""
            return text, x

    assert methods(Inside) == ["forward"]


@pytest.mark.parametrize("cls", [LlamaAttention, LlamaMLP])
def test_classes_of_transformers(cls):
    assert "forward" in methods(cls)


def made_without_source():
    namespace = {"nn": nn}
    exec("class Made(nn.Module):\n    pass", namespace)
    return namespace["Made"]


@pytest.mark.parametrize("cls", [made_without_source(), type("Made", (nn.Module,), {}), dict, int], ids=str)
def test_without_a_source_there_is_no_tree(cls):
    assert class_tree(cls) is None


def test_it_is_parsed_once():
    assert class_tree(Base) is class_tree(Base)
