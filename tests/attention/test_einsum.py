"""Equations of torch.einsum as products: what torch's own einsum computes of the same operands."""

from __future__ import annotations

import pytest
import torch

from optimum_fp8.attention.einsum import einsum_product, has_sums

SIZES = {letter: 2 + number % 5 for number, letter in enumerate("bindjshwckxymqlatgBHNKFGX")}
EQUATIONS = [  # of transformers' models
    "ibnd,jbnd->bnij",
    "bnij,jbnd->ibnd",
    "ijbs,ibns->bnij",
    "mbnd,mlb->lbnd",
    "bhwc,hkc->bhwk",
    "bhwc, wkc -> bhwk",
    "bcxd,bcyd->bcxy",
    "BHNKF,BHGF->BHNKG",
    "BHGX,BHXF->BHGF",
    "bnkc,bmkc->bknm",
    "bqnc,bnchw->bqnhw",
    "bind,jd->bnij",
    "bnid,bijd->bnij",
    "bd,bkd->bk",
    "ij,jk",
    "jk,ij",
]
WITH_DOTS = [
    ("...qc,...kc->...qk", (2, 3, 4, 5), (3, 6, 5)),
    ("...qc,...kc->...qk", (4, 5), (2, 3, 6, 5)),
    ("...qhd,...khd->...hqk", (2, 3, 4, 2, 5), (2, 1, 6, 2, 5)),
    ("...hqk,...khd->...qhd", (2, 3, 4, 6), (2, 6, 3, 5)),
    ("...si,...id", (2, 4, 6), (2, 6, 3)),
]


def check(equation, a, b):
    product = einsum_product(equation, a, b)
    expected = torch.einsum(equation, a, b)
    found = product.restore(product.left @ product.right)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)


@pytest.mark.core
@pytest.mark.parametrize("equation", EQUATIONS)
def test_it_computes_what_einsum_does(equation):
    terms = equation.replace(" ", "").split("->")[0].split(",")
    check(equation, *(torch.randn([SIZES[letter] for letter in term]) for term in terms))


@pytest.mark.parametrize("equation, a, b", WITH_DOTS)
def test_dots_stand_for_any_dimensions(equation, a, b):
    check(equation, torch.randn(a), torch.randn(b))


def test_products_that_lie_as_they_are_to_be_taken_are_not_copied():
    a, b = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 6, 5)
    product = einsum_product("bnid,bnjd->bnij", a, b)
    assert product.left is a and product.right.data_ptr() == b.data_ptr()


@pytest.mark.parametrize(
    "equation, a, b", [("ii,ij->ij", (3, 3), (3, 4)), ("ijk,jl->il", (2, 3, 4), (3, 5)), ("ij,jk->ik", (2, 3), (1, 4))]
)
def test_what_is_not_one_product(equation, a, b):
    assert einsum_product(equation, torch.randn(a), torch.randn(b)) is None


@pytest.mark.parametrize(
    "equation, sums",
    [("ijbn->bnij", False), ("blq,bhlk->bhlqk", False), ("ij->i", False), ("ij,jk", True), ("...ij,...jk->ik", True)],
)
def test_which_equations_are_products(equation, sums):
    assert has_sums(equation) == sums
