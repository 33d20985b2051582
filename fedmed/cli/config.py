"""``fedmed config show``: the composed configuration."""

from __future__ import annotations

import argparse


def add_parser(verbs: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb."""
    verb = verbs.add_parser("config", help="show the composed configuration")
    actions = verb.add_subparsers(title="actions", metavar="ACTION", required=True)
    show = actions.add_parser("show", help="every key and its value, after overrides")
    show.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="Hydra overrides")
    show.add_argument("--json", action="store_true", help="print one JSON object")
    show.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Compose and print."""
    import json
    from dataclasses import asdict

    from fedmed.config.compose import load, to_yaml

    config = load(args.overrides)
    print(json.dumps(asdict(config), indent=2) if args.json else to_yaml(config), end="")
    if args.json:
        print()
    return 0
