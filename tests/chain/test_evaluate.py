"""evaluate.py from files on disk to what it writes and prints, and the `evaluate` library beside it."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import pytest
import sacrebleu
from scripts import make_run, read_metrics, record, rows_in, script, write_rows

from kestrel.runtime.manifest import write_manifest

main = script("evaluate").main


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """A config whose run was scored, and what was printed."""
    config = make_run(tmp_path_factory.mktemp("scored"))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main(["--config", str(config), "--evaluation.resamples", "200"]) == 0
    return config, printed.getvalue()


def test_schema_of_metrics_json(scored):
    metrics = read_metrics(scored[0])
    assert (metrics["split"], metrics["n_replies"], metrics["n_dialogues"]) == ("test", 36, 12)
    assert {"signature", "systems", "paired", "verdicts", "notes", "inputs"} <= set(metrics)
    assert list(metrics["systems"]) == [
        "adapter", "base", "copy_partner", "random_persona", "random_reply", "constant_reply", "constant_words", "gold",
    ]  # fmt: skip
    for name, entry in metrics["systems"].items():
        for metric in ("bleu", "bleu_lc", "rouge_l", "f1"):
            score, (low, high) = entry[metric]["score"], entry[metric]["ci95"]
            assert 0 <= low - 1e-9 <= score + 1e-6 and score - 1e-6 <= high <= 100 + 1e-6, (name, metric)
            assert entry[metric]["signature"]
        assert {"distinct_1", "distinct_2", "length_ratio"} <= set(entry)
    adapter = metrics["systems"]["adapter"]
    assert set(adapter["perplexity"]) == {"token", "word", "bits_per_byte", "ci95"}
    assert (adapter["stopped_by_eos"], metrics["systems"]["base"]["stopped_by_eos"]) == (1.0, 0.0)
    assert "perplexity" not in metrics["systems"]["gold"] and "hits_at_1" not in adapter
    assert all(metrics["systems"]["gold"][m]["score"] == pytest.approx(100) for m in ("bleu", "rouge_l", "f1"))
    pairs = {(test["system"], test["against"]) for test in metrics["paired"]}
    assert ("adapter", "base") in pairs and any(name.startswith(("c", "r")) for _, name in pairs)
    assert all(
        set(test) == {"system", "against", "metric", "difference", "ci95", "p_value", "p_holm"}
        for test in metrics["paired"]
    )


def test_what_is_written_reproduces_the_scores(scored):
    config, _ = scored
    folder = config.parent / "run" / "evaluation"
    metrics = read_metrics(config)
    lines = {path.stem: path.read_text(encoding="utf-8").splitlines() for path in (folder / "responses").iterdir()}
    assert set(lines) == {*metrics["systems"], "reference"} - {"gold"}
    for name, entry in metrics["systems"].items():
        if name != "gold":
            bleu = sacrebleu.corpus_bleu(lines[name], [lines["reference"]], force=True)
            assert entry["bleu"]["score"] == bleu.score
            assert entry["bleu"]["precisions"] == bleu.precisions
    assert {path.name for path in folder.iterdir()} >= {"report.html", "report.md", "scores.png", "lengths.png"}


def test_printed_table_fits_and_names_everything(scored):
    config, printed = scored
    lines = printed.splitlines()
    assert max(len(line) for line in lines if str(config.parent) not in line) <= 100
    for name in ("adapter", "base", "copy_partner", "constant_words", "gold"):
        assert any(line.startswith(name + " ") for line in lines)
    assert "adapter beats base in BLEU" in printed
    assert "tok:13a" in json.dumps(read_metrics(config)) and "resamples:200" in printed


def test_a_system_that_beats_nothing_is_said_not_to(tmp_path, capsys):
    config = make_run(tmp_path)
    base = tmp_path / "run" / "generations" / "test.base.jsonl"
    (tmp_path / "run" / "generations" / "test.adapter.jsonl").write_bytes(base.read_bytes())
    record(base.parent)
    assert main(["--config", str(config), "--evaluation.resamples", "200"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "adapter does NOT beat base in BLEU (+0.00, p = 1.000: not significant)" in printed
    assert "adapter does NOT beat the best trivial system in" in printed


def test_a_generation_file_of_another_tool(tmp_path, capsys):
    """It is scored beside the run, or without any; the run's own evaluation stays as it is."""
    config = make_run(tmp_path)
    assert main(["--config", str(config), "--evaluation.resamples", "100"]) == 0
    own = (tmp_path / "run" / "evaluation" / "metrics.json").read_bytes()
    rows = [{"label": f"i like {n} dogs .", "prediction": f"i like {n + n % 2} dogs ."} for n in range(40)]
    theirs = write_rows(tmp_path / "theirs.jsonl", rows)
    capsys.readouterr()
    options = ["--evaluation.generations", str(theirs), "--evaluation.resamples", "100"]
    assert main(["--config", str(config), *options]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "run" / "evaluation" / "metrics.json").read_bytes() == own
    metrics = read_metrics(config, "evaluation-theirs")
    assert (metrics["split"], metrics["n_dialogues"]) == (None, 40)
    assert set(metrics["systems"]) == {"theirs", "random_reply", "constant_reply", "constant_words", "gold"}
    assert "Each row counts as a dialogue of its own" in printed and "perplexity" in printed
    assert "copy_partner is left out" in printed and "random_persona is left out" in printed
    assert metrics["by_reply"] == [] and metrics["by_length"]
    assert main(options) == 0 and main([*options, "--evaluation.output", str(tmp_path / "chosen")]) == 0
    for folder in (tmp_path / "evaluation-theirs", tmp_path / "chosen"):
        assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["systems"] == metrics["systems"]
    (tmp_path / "chosen" / "thesis.tex").touch()
    for name, holds in (("chosen", "thesis.tex"), ("run", "config.yaml"), (".", "")):
        capsys.readouterr()
        assert main([*options, "--evaluation.output", str(tmp_path / name) if holds else name]) == 1
        assert f"holds {holds}" in (refused := capsys.readouterr().err) and "would be deleted" in refused
    assert (tmp_path / "run" / "evaluation").is_dir() and (tmp_path / "chosen" / "thesis.tex").exists()
    reference = theirs.rename(tmp_path / "reference.jsonl")  # a name that the references' own file has
    assert main(["--evaluation.generations", str(reference), *options[2:]]) == 0
    (responses,) = tmp_path.glob("evaluation-reference*/responses")
    assert (responses / "reference.txt").read_text() != (responses / "reference_2.txt").read_text()
    assert main([]) == 2 and "--config: needs a YAML file" in capsys.readouterr().err


def test_constants_are_searched_in_training_data_of_the_same_corpus(tmp_path, capsys):
    from datasets import Dataset

    config = make_run(tmp_path)
    dataset = tmp_path / "run" / "dataset"
    reply = [{"speaker": "partner", "text": "hi"}, {"speaker": "self", "text": "i like my dogs"}]

    def write(split: str, *ids: str) -> None:
        rows = [{"dialogue_id": name, "turns": reply} for name in ids]
        Dataset.from_list(rows).save_to_disk(str(dataset / split))
        write_manifest(dataset, "dataset", {}, {})

    write("train", "t0", "t1")
    write("test", *(f"d{i}" for i in range(12)))
    options = ["--config", str(config), "--evaluation.resamples", "100", "--evaluation.samples", "0"]
    assert main(options) == 0
    assert "'i like my dogs'" in read_metrics(config)["systems"]["constant_reply"]["made_by"]
    write("test", "z")
    capsys.readouterr()
    assert main(options) == 0  # a dataset of other dialogues is no place to look
    assert "is of other dialogues" in " ".join(capsys.readouterr().out.split())
    assert "other half" in read_metrics(config)["systems"]["constant_reply"]["made_by"]


def test_seeds_are_summarized(tmp_path, capsys):
    configs = [make_run(tmp_path / name) for name in ("one", "two")]
    files = [c.parent / "run" / "generations" / "test.adapter.jsonl" for c in configs]
    rows = rows_in(files[1])
    for row in rows[::3]:
        row["response"] = "i do not"
    files[1] = write_rows(files[1].with_name("test.adapter-seed2.jsonl"), rows)
    options = ["--config", str(configs[0]), "--evaluation.generations", *map(str, files)]
    assert main([*options, "--evaluation.resamples", "100"]) == 0
    metrics = read_metrics(configs[0], "evaluation-adapter-adapter-seed2")
    (group,) = metrics["groups"].values()
    scores = [metrics["systems"][name]["bleu"]["score"] for name in group["members"]]
    assert len(scores) == 2 and group["bleu"]["mean"] == pytest.approx(sum(scores) / 2)
    assert group["bleu"]["std"] == pytest.approx(abs(scores[0] - scores[1]) / 2**0.5)
    assert "±" in capsys.readouterr().out


def test_runs_are_compared(tmp_path, capsys):
    """Three runs, two of which are seeds of one system; their bases answer alike."""
    config = make_run(tmp_path)
    runs = []
    for number, name in enumerate(("a-seed1", "a-seed2", "b")):
        runs.append(shutil.copytree(tmp_path / "run", tmp_path / "runs" / name))
        path = runs[-1] / "generations" / "test.adapter.jsonl"
        rows = rows_in(path)
        for row in rows[:: 9 - 4 * number]:
            row["response"] = "no no"
        write_rows(path, rows)
        record(path.parent)
    options = ["--config", str(config), "--evaluation.resamples", "100", "--evaluation.compare"]
    assert main([*options, *map(str, runs)]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "run" / "comparison" / "metrics.json").read_text(encoding="utf-8"))
    adapters = [name for name, entry in metrics["systems"].items() if entry["kind"] == "system"]
    assert adapters == ["adapter@a-seed1", "adapter@a-seed2", "adapter@b"] and "base" in metrics["systems"]
    assert list(metrics["groups"]) == ["adapter@a"] and "dialogues" in printed
    assert any(verdict.startswith("adapter@a-seed1 beats adapter@b in") for verdict in metrics["verdicts"])
    assert not any("beats adapter@a" in verdict for verdict in metrics["verdicts"])
    assert (tmp_path / "run" / "comparison" / "report.html").is_file()
    assert not (tmp_path / "run" / "evaluation").exists()
    (runs[1] / "generations" / "test.adapter.jsonl").write_text("{}")
    assert main([*options, *map(str, runs)]) == 1
    assert f"--config {runs[1]}/config.yaml" in capsys.readouterr().err
    assert main([*options, str(runs[0])]) == 2
    assert main([*options, str(runs[0]), f"{runs[0]}/../{runs[0].name}"]) == 1
    assert "evaluation.compare names a run twice" in capsys.readouterr().err
    assert main([*options, str(runs[0]), str(tmp_path / "nowhere")]) == 1
    assert "nowhere/generations has no generations of split test" in capsys.readouterr().err


def add_orders(folder: Path, count: int) -> None:
    """Files of both systems under further orders of the persona, the answers of the adapter ever worse."""
    for name in ("adapter", "base"):
        for order in range(1, count):
            rows = rows_in(folder / f"test.{name}.jsonl")
            for i, row in enumerate(rows):
                row["persona"] = row["persona"][::-1]
                row["reference_nll"] += order
                if name == "adapter" and i % 4 < order:
                    row["response"] = "no no"
            write_rows(folder / f"test.{name}-order{order}.jsonl", rows)
    record(folder)


def test_persona_orders_are_kept_apart_from_systems(scored, tmp_path, capsys):
    before = read_metrics(scored[0])
    config = make_run(tmp_path)
    folder = tmp_path / "run" / "generations"
    add_orders(folder, 3)
    options = ["--config", str(config), "--evaluation.resamples", "200"]
    assert main(options) == 0
    printed = capsys.readouterr().out
    metrics = read_metrics(config)
    written = tmp_path / "run" / "evaluation"
    for name in ("report.html", "report.md"):
        text = (written / name).read_text(encoding="utf-8")
        assert "Persona order: 3 orders" in text and "shuffled for each dialogue" in text
    assert (written / "responses" / "adapter-order1.txt").is_file()
    assert metrics["systems"].keys() == before["systems"].keys()
    for name, entry in metrics["systems"].items():  # further orders change nothing that is said of the one as given
        assert entry == before["systems"][name] | {"made_by": entry["made_by"]}
    assert metrics["paired"] == before["paired"] and metrics["groups"] == {}
    assert [file["system"] for file in metrics["inputs"]].count("adapter-order2") == 1
    for name in ("adapter", "base"):
        spread = metrics["persona_orders"][name]
        assert spread["orders"] == [0, 1, 2] and spread["reordered"] == 1.0
        for order in (1, 2):  # each file alone gives the same scores
            alone = [*options, "--evaluation.generations", str(folder / f"test.{name}-order{order}.jsonl")]
            assert main([*alone, "--evaluation.samples", "0"]) == 0
            entry = read_metrics(config, f"evaluation-{name}-order{order}")["systems"][f"{name}-order{order}"]
            expected = [entry[key]["score"] for key in ("bleu", "rouge_l", "f1")] + [entry["perplexity"]["token"]]
            values = [spread[key]["values"][order] for key in ("bleu", "rouge_l", "f1", "perplexity.token")]
            assert values == pytest.approx(expected, rel=1e-12)
    assert metrics["persona_orders"]["adapter"]["f1"]["relative_change"] > 0.1
    assert metrics["persona_orders"]["base"]["f1"]["relative_change"] == 0
    assert "Persona order: 3 orders" in printed and "adapter-order" not in printed
    assert max(len(line) for line in printed.splitlines() if str(tmp_path) not in line) <= 100
    assert any(verdict.startswith("adapter in its worst order") for verdict in metrics["verdicts"])


@pytest.mark.parametrize(
    ("options", "status", "says"),
    [
        (["--evaluation.generations", "none.jsonl"], 1, "none.jsonl does not exist"),
        (["--generation.split", "validation"], 1, "has no generations of split validation; run generate.py first"),
        (["--evaluation.normalization", "upper"], 2, "evaluation.normalization"),
        (["--evaluation.extra_metrics", "no_such_folder/metric"], 1, "cannot load 'no_such_folder/metric'"),
    ],
)
def test_failures_print_a_message_and_write_nothing(tmp_path, capsys, monkeypatch, options, status, says):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    config = make_run(tmp_path)
    assert main(["--config", str(config), *options]) == status
    assert says in capsys.readouterr().err
    assert not (tmp_path / "run" / "evaluation").exists()
