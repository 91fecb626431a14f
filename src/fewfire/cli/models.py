"""`fewfire models`: the published models known by name, the families, the hardware catalogue."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def models(
    hardware: Annotated[bool, typer.Option("--hardware", help="List the hardware catalogue instead.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """The published models known by name, the hub families, and what is not published."""
    from fewfire.cli.output import console, print_json

    document = _hardware_document() if hardware else _models_document()
    if as_json:
        print_json(document)
        return
    out = console()
    if hardware:
        _print_hardware(document, out)
    else:
        _print_models(document, out)


def _models_document() -> dict[str, Any]:
    from fewfire.families import known, published
    from fewfire.plan.subject import published_subject

    rows = []
    for name in published.names():
        subject = published_subject(name)
        counts = subject.counts
        rows.append(
            {
                "name": name,
                "family": subject.config.family,
                "total": counts.total,
                "active": counts.active,
                "active_excluding_embedding": counts.active_excluding_embedding,
                "published_total": subject.published_total,
                "published_active": subject.published_active,
            }
        )
    closed = [{"name": entry.name, "status": entry.status, "words": entry.words} for entry in published.not_published()]
    return {"models": rows, "families": list(known()), "not_published": closed}


def _print_models(document: dict[str, Any], out: Any) -> None:
    from fewfire.cli.output import table
    from fewfire.sizes import format_count

    rows = table("model", "family", "total", "active", "without embedding", "published")
    for row in document["models"]:
        published = " / ".join(part for part in (row["published_total"], row["published_active"]) if part)
        rows.add_row(
            row["name"],
            row["family"],
            format_count(row["total"]),
            format_count(row["active"]),
            format_count(row["active_excluding_embedding"]),
            published or "-",
        )
    out.print(rows)
    out.print()
    out.print(f"Families read from a hub config.json: {', '.join(document['families'])}.")
    for entry in document["not_published"]:
        out.print(f"{entry['name']}: not published ({entry['status']}): {entry['words']}")


def _hardware_document() -> dict[str, Any]:
    from dataclasses import asdict

    from fewfire.plan.hardware import load_catalogue

    catalogue = load_catalogue()
    return {
        "date": catalogue.date,
        "prices_date": catalogue.prices_date,
        "parts": [
            {key: value for key, value in asdict(part).items() if value not in (None, (), "")}
            for part in catalogue.parts
        ],
        "sources": catalogue.sources,
    }


def _print_hardware(document: dict[str, Any], out: Any) -> None:
    from fewfire.cli.output import table

    rows = table("part", "GB", "GB/s", "bf16 TFLOPS", "fp8", "link GB/s", "$/h")
    for part in document["parts"]:
        mark = " *" if part.get("unverified") else ""
        numbers = [part.get(key) for key in ("bf16_tflops", "fp8_tflops", "link_gbs", "price_usd_per_hour")]
        cells = ["-" if value is None else f"{value:g}" for value in numbers]
        rows.add_row(part["name"] + mark, f"{part['memory_gb']:g}", f"{part['bandwidth_gbs']:g}", *cells)
    out.print(rows)
    out.print()
    out.print(
        f"Figures of {document['date']}, prices of {document['prices_date']}; * has fields not read on a page. "
        "FEWFIRE_HARDWARE names a file that adds parts."
    )
