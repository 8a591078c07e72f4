"""The scale methods whose scales any weight and any input can have, for tests that ask for every method."""

from optimum_fp8.scales import SCALE_METHODS

FOR_ANY_SHAPE = {
    name: method
    for name, method in SCALE_METHODS.items()
    if not (method.weight.granularity.matrices_only or method.activation.granularity.matrices_only)
}
