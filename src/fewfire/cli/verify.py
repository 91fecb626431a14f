"""`fewfire verify PACK`: every byte is read and compared with its checksum."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fewfire.errors import ConfigError


def verify(
    pack: Annotated[str, typer.Argument(help="The folder of a pack.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Read a whole pack and compare all checksums; the first damage is named with file, record and byte."""
    from fewfire.checkpoints.pack import is_pack, verify_pack
    from fewfire.cli.output import note, print_json
    from fewfire.sizes import format_bytes

    if not is_pack(pack):
        raise ConfigError(f"{pack} is no pack (it has no fewfire.json); `fewfire pack` or `fewfire init` makes one")
    found = verify_pack(Path(pack))
    if as_json:
        print_json({"path": pack, "intact": True, "tensors": found.tensors, "experts": found.experts,
                    "bytes": found.num_bytes})  # fmt: skip
        return
    note(f"{pack} is intact: {found.tensors} tensors, {found.experts} expert records, {format_bytes(found.num_bytes)}")
