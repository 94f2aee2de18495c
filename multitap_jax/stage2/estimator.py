"""scikit-learn's habits for an estimator, without importing scikit-learn unless it is there already."""

import inspect
import sys
from typing import Any


class NotFittedError(ValueError, AttributeError):
    """The head is used before it is fitted."""


class Estimator:
    """Parameters are the arguments of `__init__` under their names; attributes of a fit end in an underscore."""

    _estimator_type = "regressor"

    @classmethod
    def _parameters(cls) -> tuple[str, ...]:
        return tuple(name for name in inspect.signature(cls.__init__).parameters if name != "self")

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """The constructor's arguments."""
        return {name: getattr(self, name) for name in self._parameters()}

    def set_params(self, **params: Any) -> "Estimator":
        """Changes constructor arguments; ValueError for an unknown one."""
        known = self._parameters()
        for name, value in params.items():
            if name not in known:
                raise ValueError(f"{name!r} is no parameter of {type(self).__name__}; there are {', '.join(known)}")
            setattr(self, name, value)
        return self

    def __repr__(self) -> str:
        defaults = {name: p.default for name, p in inspect.signature(type(self).__init__).parameters.items()}
        changed = [
            f"{name}={value!r}" for name, value in self.get_params().items() if repr(value) != repr(defaults[name])
        ]
        return f"{type(self).__name__}({', '.join(changed)})"

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect of this estimator; only scikit-learn calls this."""
        from sklearn.utils import RegressorTags, Tags, TargetTags

        targets = TargetTags(required=True, multi_output=True, single_output=True)
        return Tags(estimator_type="regressor", target_tags=targets, regressor_tags=RegressorTags())

    def __sklearn_is_fitted__(self) -> bool:
        """Whether there are coefficients."""
        return hasattr(self, "coef_")

    def _check_fitted(self) -> None:
        if not self.__sklearn_is_fitted__():
            # Code that catches scikit-learn's own error has imported it.
            theirs = sys.modules.get("sklearn.exceptions")
            error = theirs.NotFittedError if theirs is not None else NotFittedError
            raise error(f"this {type(self).__name__} is not fitted yet: call fit, fit_store or fit_stream, or load one")
