"""Every error that fedmed raises.

::

    FedmedError                      exit 1
    ├── UsageError                   exit 2: what the caller gave can be mended by the caller
    │   ├── ConfigError              a key or value of the configuration
    │   ├── DataError                a manifest, an image, a site folder
    │   ├── ModelError               an unknown network or parameter, a weights file
    │   │   └── IncompatibleModel    the network cannot be trained with differential privacy
    │   └── CheckpointError          a run folder cannot be read or written (disk full, modes)
    ├── PolicyRefused                the site's own rules forbid the task; carries a reason code
    │   └── BudgetExhausted          the cohort's privacy budget would be passed
    ├── LedgerError                  the ledger cannot be read or written: nothing was trained
    ├── AuditError                   the audit log's chain is broken
    ├── TrainingFailed               a site's local training broke off: nothing was released
    ├── FederationError              a round or a run that cannot go on
    │   ├── QuorumNotMet             fewer sites answered than the plan demands
    │   ├── UpdateRejected           a site's answer failed validation
    │   ├── StoreError               the coordinator's database cannot be used now
    │   └── RunStopped               an operator stopped the run
    ├── TrustError                   a key, certificate or signature that cannot be relied on
    ├── LinkError                    the network between coordinator and site
    │   ├── Unreachable              nobody answers: worth another try later
    │   └── LinkRefused              the other side said no; carries its status
    └── RunInterrupted               exit 130: stopped by the user, the run can be resumed

Each message is one line: what is wrong, where, and the remedy after a semicolon. No message
holds a patient identifier or pixel data.
"""

from __future__ import annotations


class FedmedError(Exception):
    """Base of all errors raised on purpose.

    Args:
        problem: what is wrong and where (file, row, column, key).
        remedy: what the reader should do about it; joined to the problem by ``"; "``.
    """

    exit_code = 1

    def __init__(self, problem: str, remedy: str = "") -> None:
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{problem}; {remedy}" if remedy else problem)


class UsageError(FedmedError):
    """Input that its giver can mend: wrong arguments, configuration, data."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration key or value is wrong."""


class DataError(UsageError):
    """A site folder, its manifest or one of its images is wrong."""


class ModelError(UsageError):
    """A network, its parameters or its weights file is wrong."""


class IncompatibleModel(ModelError):
    """The network cannot be trained with differential privacy as it stands."""


class PolicyRefused(FedmedError):
    """A site's policy forbids the task.

    Args:
        code: stable reason code, lower case with hyphens (``"epsilon-over-budget"``).
    """

    def __init__(self, code: str, problem: str, remedy: str = "") -> None:
        self.code = code
        super().__init__(problem, remedy)


class BudgetExhausted(PolicyRefused):
    """Training would take the cohort past its privacy budget."""


class LedgerError(FedmedError):
    """The privacy ledger cannot be read or written."""


class AuditError(FedmedError):
    """An audit log fails verification."""


class TrainingFailed(FedmedError):
    """A site's local training broke off; nothing was released, what it was charged stays."""


class FederationError(FedmedError):
    """A federated round or run cannot go on."""


class QuorumNotMet(FederationError):
    """Fewer sites gave a valid update than the plan demands."""


class UpdateRejected(FederationError):
    """A site's update failed validation and was not aggregated."""


class StoreError(FederationError):
    """The coordinator's database cannot be read or written."""


class RunStopped(FederationError):
    """An operator stopped the run; its last checkpoint stands."""


class TrustError(FedmedError):
    """A key, certificate or signature cannot be relied on."""


class LinkError(FedmedError):
    """The link between coordinator and site failed."""


class Unreachable(LinkError):
    """Nobody answers at the other end; worth another try later."""


class LinkRefused(LinkError):
    """The other side refused a request.

    Args:
        status: its HTTP status.
    """

    def __init__(self, status: int, problem: str, remedy: str = "") -> None:
        self.status = status
        super().__init__(problem, remedy)


class CheckpointError(UsageError):
    """A checkpoint or run folder cannot be read or written: disk full, modes, torn file."""


class RunInterrupted(FedmedError):
    """The user stopped the run; it can be resumed."""

    exit_code = 130
