"""The tests of the reduction, with its Triton kernels in torch's place; run in Triton's interpreter.

TRITON_INTERPRET=1 python -m tests.support.kernel_reduction [PYTEST'S ARGUMENTS]
"""

import sys
import threading

import pytest

from stages.cache_logits import draws, reduction_kernel

ONE_AT_A_TIME = threading.Lock()
"""The interpreter has one grid for the process; the tests' ranks are threads."""
QUIET = "ignore:invalid value encountered:RuntimeWarning"
"""Of numpy, for what the kernels compute beside a mask."""


def interpreted(reduce):
    """`reduce`, by one thread after the other."""

    def reduce_shard(*args):
        with ONE_AT_A_TIME:
            return reduce(*args)

    return reduce_shard


if __name__ == "__main__":
    reduction_kernel.reduce_shard = interpreted(reduction_kernel.reduce_shard)
    draws.kernel_of = lambda device: reduction_kernel
    sys.exit(pytest.main(["-W", QUIET, *sys.argv[1:]]))
