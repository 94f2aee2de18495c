"""How many threads LAPACK gets: one for small matrices, where several mostly wait for each other.

A tridiagonal reduction is thousands of short matrix-vector products, and between any two of them all threads meet. At
1,536 features two threads on two cores that others use too took 4 to 14 times the processor time of one, and longer.
The pool also goes on spinning after a call, on the cores that XLA wants next.
"""

import functools
from contextlib import AbstractContextManager

import threadpoolctl

ALONE_UP_TO = 2048  # rows and columns of a matrix


@functools.cache
def _controller() -> threadpoolctl.ThreadpoolController:
    return threadpoolctl.ThreadpoolController()


def for_matrices(order: int) -> AbstractContextManager:
    """Within it BLAS has the threads that matrices of `order` rows and columns want, in the whole process."""
    return _controller().limit(limits=1 if order <= ALONE_UP_TO else None, user_api="blas")
