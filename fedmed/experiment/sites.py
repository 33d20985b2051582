"""The simulated hospitals of an experiment: their images, books and agents."""

from __future__ import annotations

import fcntl
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from fedmed.audit.log import AuditLog, DeferredAuditLog
from fedmed.codec import encode
from fedmed.config.schema import Config, SourceConfig
from fedmed.data.importers import IMPORTERS
from fedmed.data.site import SiteData, load_sites, pool_sites
from fedmed.data.synthetic import SyntheticSpec, make_phantoms
from fedmed.errors import CheckpointError, ConfigError
from fedmed.experiment.plan import one_of, partition_spec, prep_spec, site_policy, task_spec
from fedmed.federation.accounts import Account, Accounts
from fedmed.federation.client_app import make_client_app
from fedmed.federation.flower import context_of
from fedmed.federation.simulation.grid import Handler
from fedmed.federation.site_agent import Listener, SiteAgent
from fedmed.privacy.ledger import Ledger
from fedmed.training.devices import trainers
from fedmed.training.trainer import Trainer

POOLED = "centralized"


@dataclass(frozen=True)
class Leg:
    """Sites that train one model together.

    ``mode=federated`` and ``centralized`` have one leg, ``local`` one a site.

    Attributes:
        name: file-safe name.
        folder: where its checkpoints and metrics go.
        agents: by site name.
        members: names of the hospitals whose test images judge its model.
    """

    name: str
    folder: Path
    agents: Mapping[str, SiteAgent]
    members: tuple[str, ...]


def site_folder(config: Config) -> Path:
    """The images: ``data.root``, an import of ``data.source``, or generated phantoms.

    Imports and phantoms are made once and kept under ``paths.cache_dir``.

    Raises:
        DataError, ConfigError: the source is missing or wrong.
    """
    data = config.data
    if data.root is not None:
        return Path(data.root)
    cache = Path(config.paths.cache_dir)
    if data.source.kind is not None:
        if data.source.path is None:
            raise ConfigError("data.source.path is missing", "give the raw data's path")
        recipe = hashlib.sha256(encode(vars(data.source)).encode()).hexdigest()[:12]
        target = cache / "imports" / f"{data.name}-{recipe}"
        if not target.exists():
            if not Path(data.source.path).exists():
                raise ConfigError(
                    f"data.source.path={data.source.path} does not exist",
                    "put the raw data there, or say where it is with data.source.path or, for a "
                    "shipped experiment, with the variable FEDMED_DATA",
                )
            with _alone(target):
                if not target.exists():
                    _import(data.source, Path(data.source.path), target)
        return target
    if not data.name.startswith("synthetic"):
        raise ConfigError(
            "data.root is missing", "give a site folder with data.root=DIR or use data=synthetic"
        )
    synthetic, task = data.synthetic, task_spec(config)
    spec = SyntheticSpec(
        kind=task.kind,
        classes=len(task.classes),
        dims=task.dims,
        channels=task.channels,
        image_size=task.image_size,
        sites=synthetic.sites,
        patients_per_site=synthetic.patients_per_site,
        images_per_patient=(synthetic.images_per_patient[0], synthetic.images_per_patient[-1]),
        intensity_shift=synthetic.intensity_shift,
        prevalence_shift=synthetic.prevalence_shift,
        contrast=synthetic.contrast,
        seed=synthetic.seed,
        names=task.classes,
    )
    recipe = hashlib.sha256(encode(spec).encode()).hexdigest()[:12]
    target = cache / "phantoms" / recipe
    make_phantoms(target, spec)
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Runs that begin at once import once.

    Where no lock can be had, whoever writes the folder says why.
    """
    with ExitStack() as stack:
        with suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context((target.parent / f".{target.name}.lock").open("a"))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _import(source: SourceConfig, path: Path, target: Path) -> None:
    """Run an importer with the options that the configuration gives."""
    importer = IMPORTERS[one_of("data.source.kind", source.kind or "", tuple(IMPORTERS))]
    known = [f.name for f in fields(importer.options)]
    for key in source.options:
        one_of("data.source.options key", key, tuple(known))
    given: dict[str, Any] = {
        k: tuple(v) if isinstance(v, list) else v for k, v in source.options.items()
    }
    importer.run(path, target, importer.options(**given))


def load_hospitals(config: Config) -> tuple[SiteData, ...]:
    """Every simulated hospital's prepared images, in order of name."""
    seed = config.data.partition.seed
    drawn = config.data.partition.kind in ("iid", "dirichlet")
    if drawn and seed is None and config.site.state_dir is not None:
        raise ConfigError(
            "site.state_dir keeps ledgers over runs, but the sites are drawn anew by seed",
            "give data.partition.seed, so that each ledger stays with its patients",
        )
    return load_sites(
        site_folder(config),
        task_spec(config),
        prep_spec(config),
        partition_spec(config),
        config.seed if seed is None else seed,
        allow_one_class=config.data.allow_one_class,
    )


def open_legs(
    config: Config, hospitals: Sequence[SiteData], folder: Path, listener: Listener | None = None
) -> tuple[Leg, ...]:
    """Agents of all sites, grouped by who trains together.

    Args:
        folder: the run folder.
        listener: told of local work.
    """
    names = tuple(h.name for h in hospitals)
    trainer_of = trainers(config.trainer.device, config.trainer.devices)
    opened = partial(open_site, config, trainer_of, folder, listener=listener)
    if config.mode == "local":
        return tuple(
            Leg(
                name=h.name,
                folder=folder / "local" / h.name,
                agents={h.name: opened(h)},
                members=(h.name,),
            )
            for h in hospitals
        )
    if config.mode == "centralized":
        agent = opened(pool_sites(hospitals, POOLED), charged=names)
        return (Leg(POOLED, folder, {POOLED: agent}, names),)
    agents = {h.name: opened(h) for h in hospitals}
    return (Leg("federated", folder, agents, names),)


def open_site(
    config: Config,
    trainer_of: Callable[[SiteData], Trainer],
    folder: Path,
    data: SiteData,
    *,
    listener: Listener | None = None,
    charged: Sequence[str] = (),
) -> SiteAgent:
    """One site's agent with its ledger and audit log.

    Args:
        trainer_of: makes the site's trainer.
        charged: hospitals whose budgets the training spends; by default the site's own.
    """
    home = site_home(config, folder, data.name)
    # With Ray a site's own worker writes its log; the driver only asks after sizes and budgets.
    log = DeferredAuditLog if config.federation.backend == "ray" else AuditLog
    policy = site_policy(config)
    accounts = [
        Account(Ledger(site_home(config, folder, name) / "ledger.db"), name)
        for name in (charged or (data.name,))
    ]
    return SiteAgent(
        name=data.name,
        trainer=trainer_of(data),
        policy=policy,
        accounts=Accounts(accounts, policy),
        audit=log(home / "audit.jsonl"),
        state_dir=home,
        listener=listener,
    )


def site_home(config: Config, folder: Path, name: str) -> Path:
    """A site's own folder, ``<run>/sites/<name>``; a link where ``site.state_dir`` keeps it."""
    shown = folder / "sites" / name
    try:
        if config.site.state_dir is None:
            shown.mkdir(parents=True, exist_ok=True)
            return shown
        kept = (Path(config.site.state_dir) / name).resolve()
        kept.mkdir(parents=True, exist_ok=True)
        shown.parent.mkdir(parents=True, exist_ok=True)
        if not shown.exists():
            shown.symlink_to(kept, target_is_directory=True)
        elif shown.resolve() != kept:
            raise CheckpointError(
                f"the run's ledger of site {name!r} is in {shown.resolve()}, site.state_dir says "
                f"{kept}",
                "resume with the run's own site.state_dir",
            )
    except OSError as error:
        raise CheckpointError(
            f"cannot make the state folder of site {name!r}: {error.strerror}",
            "choose a writable site.state_dir or paths.output_dir",
        ) from error
    return kept


def handler_of(agent: SiteAgent, node_id: int, run_id: int) -> Handler:
    """What answers a node's messages: the client app, unmodified, bound to one agent."""
    app = make_client_app(lambda _: agent)
    context = context_of(run_id, node_id, agent.name)
    return lambda message: app(message, context)


def worker_handler(config: Config, folder: Path, name: str, node_id: int, run_id: int) -> Handler:
    """A handler built inside a worker process, which reads the site's images itself."""
    hospitals = load_hospitals(config)
    opened = partial(open_site, config, trainers(config.trainer.device, 1), folder)
    if config.mode == "centralized":
        names = tuple(h.name for h in hospitals)
        agent = opened(pool_sites(hospitals, POOLED), charged=names)
    else:
        agent = opened(next(h for h in hospitals if h.name == name))
    return handler_of(agent, node_id, run_id)
