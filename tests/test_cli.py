"""The command line's surface: every verb's help, one-line errors, exit statuses, no torch where none is needed."""

import json
import resource
import subprocess
import sys
from typing import NamedTuple

import pytest

from fewfire.cli.main import VERBS, load_verb, main

PLAN_FIELDS = {
    "parameters": {"total", "active", "active_excluding_embedding", "experts", "trunk", "router", "embedding"},
    "memory": {"weights_bytes", "kv_cache_bytes", "floor_bytes"},
    "per_token": {"flops", "bytes_read"},
}
HARDWARE_FIELDS = {
    "name", "fits", "devices", "nodes", "decode_tokens_per_s", "prefill_tokens_per_s", "time_to_first_token_s",
    "usd_per_million_tokens",
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    """No profile of this machine, whatever the developer has measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWFIRE_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


class Result(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def run(capsys):
    """The command line in this process: what it prints, and its exit status."""

    def call(*words):
        with pytest.raises(SystemExit) as stop:
            main(words)
        printed = capsys.readouterr()
        return Result(stop.value.code or 0, printed.out, printed.err)

    return call


def spawn(*words):
    return subprocess.run([sys.executable, "-m", "fewfire", *words], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_function_and_help(verb, run):
    assert load_verb(verb).__doc__
    result = run(verb, "--help")
    assert result.returncode == 0 and "Usage: fewfire" in result.stdout


def test_bare_command_shows_help_and_version_prints_one_line(run):
    assert "plan" in run().stdout
    version = run("--version")
    assert version.returncode == 0 and version.stdout.startswith("fewfire ") and version.stdout.count("\n") == 1


@pytest.mark.parametrize(
    "words, expected",
    [
        (["plan", "--bogus"], "--bogus"),
        (["plan"], "model"),
        (["plam", "x"], "did you mean plan"),
        (["plan", "mixtral-8x9b"], "mixtral-8x7b"),
        (["plan", "30b", "--hardware", "H1000"], "h100"),
        (["plan", "30b", "--hardware", "0xH100"], "1 to 100000"),
        (["plan", "30b", "--context", "-3"], "context (-3)"),
        (["plan", "30b", "--context", "99999999"], "or less"),
        (["plan", "30b", "--batch", "0"], "batch (0)"),
        (["plan", "30b", "--quant", "q3"], "q3"),
        (["plan", "30b", "--memory", "8G"], "8GiB"),
        (["plan", "30b", "--price", "0"], "above 0"),
        (["plan", "30b", "--price", "1", "--buy-usd", "9"], "not both"),
        (["plan", "30b", "--currency", "KES"], "KES=129"),
        (["plan", "30b", "--currency", "KES=0"], "KES=129"),
        (["plan", "30b", "--tokens-per-month", "many"], "--tokens-per-month"),
        (["plan", "30b", "--output-share", "2"], "output share"),
        (["plan", "30b", "--hardware", "here"], "fewfire doctor"),
        (["plan", "30b", "--routing", "/nonexistent.json"], "cannot be read"),
        (["plan", "30b", "--explain", "nonsense"], "nearest"),
        (["plan", "30b", "--placement", "p.json"], "--routing"),
        (["plan", "30b", "--html", "/nonexistent/x.html"], "cannot be written"),
        (["plan", "30b", "--measured", "fast"], "--measured"),
        (["plan", "30b", "--memory", "0"], "above 0"),
        (["plan", "30b", "--prompt", "-5"], "prompt (-5)"),
        (["plan", "30b", "--domain", "x"], "--routing"),
        (["plan", "30b", "--answer", "5"], "--simulate"),
        (["plan", "30b", "--years", "5"], "--buy-usd"),
        (["plan", ""], "model is empty"),
        (["plan", "/nonexistent/config.json"], "cannot be read"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(words, expected, run):
    result = run(*words)
    assert result.returncode == 2, result.stderr
    errors = [line for line in result.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1 and errors[0].startswith("error: ")
    assert expected in result.stderr and result.stdout == ""


def test_plan_json_has_the_contract_and_nothing_else_on_stdout(run):
    document = json.loads(run("plan", "mixtral-8x7b", "--json", "--hardware", "8xH200,H100").stdout)
    assert document["model"] == "mixtral-8x7b"
    for part, names in PLAN_FIELDS.items():
        assert names <= set(document[part])
        assert all(isinstance(document[part][name], int) for name in names)
    assert [HARDWARE_FIELDS - set(machine) for machine in document["hardware"]] == [set(), set()]
    assert document["parameters"]["total"] == 46_702_792_704
    assert [machine["fits"] for machine in document["hardware"]] == [True, False]
    assert document["hardware"][1]["devices"] == 2


def test_plan_ends_in_its_sentence_and_fits_a_terminal(run):
    result = run("plan", "mixtral-8x7b", "--versus", "llama-2-70b")
    lines = result.stdout.rstrip().split("\n")
    assert lines[-1] == (
        "Computes like a 12.9B dense model; housed like a 46.7B one. Quality on your text: not measured (fewfire eval)."
    )
    assert "46,702,792,704" in result.stdout and "68,976,648,192" in result.stdout
    assert max(map(len, lines[:-5])) <= 100


@pytest.mark.parametrize(
    "name, status", [("gpt-4", "reported"), ("gemini-1.5", "confirmed"), ("claude", "not characterised")]
)
def test_what_is_not_published_is_said_in_words(name, status, run):
    result = run("plan", name)
    assert result.returncode == 0 and status in " ".join(result.stdout.split())
    document = json.loads(run("plan", name, "--json").stdout)
    assert document["published"] is False and "parameters" not in document


def test_plan_is_quick_and_never_loads_torch():
    code = (
        "import sys; sys.argv = ['fewfire', 'plan', 'mixtral-8x7b']\n"
        "from fewfire.cli.main import main\n"
        "try: main()\nexcept SystemExit as e: assert not e.code\n"
        "assert not {'torch', 'numpy', 'transformers'} & set(sys.modules), 'heavy import'"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # Processor time, as a multiple of what the command line's own libraries take to import: a figure of the code, where
    # seconds would be one of the machine. On an idle one the multiple was 3 and the whole 0.3 s.
    imports = [sys.executable, "-c", "import typer, pydantic.types, rich.console"]
    both = [
        (cpu_seconds(lambda: spawn("plan", "mixtral-8x7b")), cpu_seconds(lambda: subprocess.run(imports)))
        for _ in range(3)
    ]
    assert min(plan for plan, _ in both) < 7 * min(base for _, base in both)


def cpu_seconds(run):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    run()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_a_closed_pipe_is_no_error():
    command = f"{sys.executable} -m fewfire plan mixtral-8x7b | head -1"
    result = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in result.stderr


def test_plan_writes_a_report_and_says_so_on_stderr(tmp_path, run):
    page = tmp_path / "report.html"
    result = run("plan", "mixtral-8x7b", "--hardware", "2xH100", "--html", str(page), "--json")
    assert json.loads(result.stdout)["model"] == "mixtral-8x7b" and f"wrote {page}" in result.stderr
    assert page.read_text().startswith("<!doctype html>")
    assert list(tmp_path.iterdir()) == [page]


def test_plan_explains_one_figure(run):
    result = run("plan", "mixtral-8x7b", "--explain", "kv_cache_bytes")
    assert "536,870,912" in result.stdout and "formula" in result.stdout and "source" in result.stdout


def test_doctor_measures_and_plan_uses_it(tmp_path, run):
    result = run("doctor", "--json", "--disk", str(tmp_path))
    document = json.loads(result.stdout)
    assert {"isa", "cores", "ram_bytes", "memory_limit_bytes", "ram_read_bytes_per_s", "disk_read_bytes_per_s",
            "int8_ops_per_s"} <= set(document)  # fmt: skip
    assert max(document["ram_read_bytes_per_s_by_threads"].values()) == document["ram_read_bytes_per_s"]
    assert len(document["disk_read_bytes_per_s_by_size"]) >= 1
    if document["kernels"] is not None:  # the extension is built
        assert document["int8_ops_per_s"] > 1e9 and document["kernels"]["product_ops_per_s"]["q4"]["1"] > 1e8
    made = json.loads(run("plan", "smollm2-135m", "--hardware", "here", "--json").stdout)
    assert made["hardware"][0]["fits"] and made["hardware"][0]["decode_tokens_per_s"] > 0


def test_models_lists_everything_known(run):
    document = json.loads(run("models", "--json").stdout)
    names = {row["name"] for row in document["models"]}
    assert {"mixtral-8x7b", "deepseek-v3", "gpt2"} <= names and len(names) > 30
    assert {row["name"] for row in document["not_published"]} == {"gpt-4", "gemini-1.5", "claude"}
    assert max(map(len, run("models").stdout.splitlines()[:30])) <= 100
    parts = json.loads(run("models", "--hardware", "--json").stdout)["parts"]
    assert len(parts) > 30 and all(part["bandwidth_gbs"] > 0 for part in parts)
