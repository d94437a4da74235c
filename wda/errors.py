"""Errors and warnings that have a name of their own; every other bad argument is a `ValueError` or a `TypeError`."""

__all__ = ["BudgetExceeded", "DataUnavailable", "NotPiecewiseAffine", "Untrustworthy"]


class BudgetExceeded(ValueError):
    """A distribution lies outside the Wasserstein ball (or the box) it claims to be in."""


class DataUnavailable(FileNotFoundError):
    """A data set or a model is not on this machine; the message says what to put where."""


class NotPiecewiseAffine(ValueError):
    """A network has a layer that the method asked for cannot treat; the message names it."""


class Untrustworthy(UserWarning):
    """What an attack found says little about the model: it is random, or its gradients lead nowhere, or it fails."""
