"""The benchmark of fine-tuning: its labels, its measures, and its grid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn

from tests.benchmarks import texts, tuning
from tests.benchmarks.contenders import CONTENDERS
from tests.benchmarks.stack_of_llamas import Llamas, Shape
from tests.benchmarks.texts import IGNORED, Task, docstrings, load, padded, save
from tests.benchmarks.tuning import Point, Results, Sweep

SMALL = Shape(hidden=16, layers=1, vocabulary=40, heads=2, intermediate=24)
SEEDS = (1, 2)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "SHAPE", SMALL)


def weights(seed: int = 5) -> dict[str, torch.Tensor]:
    return {name: param.detach()[0] for name, param in Llamas(SMALL, [seed]).named_parameters()}


def task() -> Task:
    """Rows of different lengths, whose last token is an answer of 30 or 31: the parity of the first."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(2, 30, (40, 8), generator=generator)
    labels = torch.full_like(rows, IGNORED)
    for row, label, length in zip(rows, labels, torch.randint(3, 9, (40,), generator=generator).tolist(), strict=True):
        row[length - 1] = label[length - 1] = 30 + row[0] % 2
        row[length:] = 0
    rows, labels = rows.to(torch.int16), labels.to(torch.int16)
    return Task(rows[:32], labels[:32], rows[32:], labels[32:], answers=(30, 31))


def test_only_answers_are_learnt_and_what_is_too_long_loses_its_beginning() -> None:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(["ab"], vocab_size=256, show_progress=False)
    a, b, c = (tokenizer.encode(letter).ids[0] for letter in "abc")
    rows, labels = padded([[("aab", False), ("c", True)], [("b", False), ("c", True)]], tokenizer, 3)
    assert rows.tolist() == [[a, b, c], [b, c, 0]]
    assert labels.tolist() == [[IGNORED, IGNORED, c], [IGNORED, c, IGNORED]]


def test_an_answer_is_asked_for_on_the_way_to_it() -> None:
    rows, labels = torch.arange(100, 140).view(2, 20), torch.full((2, 20), IGNORED)
    labels[0, 18], labels[1, 8] = 1, 2
    same, often = texts.asked_often(rows, labels)
    assert torch.equal(same, rows)
    assert {place: int(often[0, place]) for place in range(20) if often[0, place] != IGNORED} == {8: 1, 16: 1, 18: 1}
    assert torch.equal(often[1], labels[1])


def test_libraries_are_told_by_what_they_say_and_not_by_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def files_of(package: str) -> list[Path]:
        # Each says something of its own in ten files, more of it where the name is longer, and one thing with all.
        files = [tmp_path / package / f"{number}.py" for number in range(10)]
        for number, file in enumerate(files):
            file.parent.mkdir(exist_ok=True)
            what = f"of file {number} as {package}.{package[::-1]} does"
            said = [f"Return item {one} {what}.{' And so on.' * 40}" for one in range(len(package))]
            said += [f"Return what every one of them would return at any time.{' Whatever.' * 10}", "Short.", said[0]]
            file.write_text("\n".join(f'def f():\n    """{text}\n\n    More."""' for text in said))
        return files

    monkeypatch.setattr(texts, "files_of", files_of)
    train, held_out = texts.origin_texts(paragraphs=False)
    assert not {text for text, _ in train} & {text for text, _ in held_out}
    for part in (train, held_out):
        assert not any(name in text for text, _ in part for name in (*texts.ORIGINS, "Short"))
        assert {len(text) for text, _ in part} <= {250, 55 + 100 + 6}  # and that is where they end
        assert all(texts.ORIGINS[label][::-1] in text for text, label in part if "every one" not in text)
        assert len(set(part)) == len(part)
    # nltk has the least to say: 4 things a file, of which 8 are trained on and 2 held out, and what all say.
    assert torch.tensor([label for _, label in train]).bincount().tolist() == [32] * 8
    assert torch.tensor([label for _, label in held_out]).bincount().tolist() == [9] * 8


def test_docstrings_of_what_is_no_python_are_none() -> None:
    assert docstrings('"""One."""\ndef f():\n    """Two."""') == ["One.", "Two."]
    assert docstrings("print 'old'") == []


def test_a_file_has_rows_that_are_their_own_labels_once(tmp_path: Path) -> None:
    rows = torch.zeros(100_000, dtype=torch.int16)[None]
    save({"one": Task(rows, rows, rows[:, :5], rows[:, :5], (1, 2))}, tmp_path / "texts.pt")
    assert (tmp_path / "texts.pt").stat().st_size < 250_000
    assert load(tmp_path / "texts.pt")["one"].answers == (1, 2)


@pytest.mark.usefixtures("small")
def test_a_stack_begins_with_the_pretrained_weights_and_has_adapters_by_seed() -> None:
    pretrained = weights()
    model = tuning.stack(pretrained, [2, 1, 2], 2, "cpu")
    own = Llamas(SMALL, [1, 2], 2)
    for name, value in pretrained.items():
        assert all(torch.equal(one, value) for one in model.get_parameter(name))
    first, second = own.get_parameter("0_q_a")
    for found, wanted in zip(model.get_parameter("0_q_a"), (second, first, second), strict=True):
        assert torch.equal(found, wanted)
    assert not model.get_parameter("0_q").requires_grad


@pytest.mark.usefixtures("small")
def test_loss_and_accuracy_are_those_of_one_row_after_the_other() -> None:
    given = task()
    model = tuning.stack(weights(), [1, 2], 0, "cpu")
    with torch.no_grad():
        model.get_parameter("head")[1].copy_(torch.randn(SMALL.vocabulary, SMALL.hidden))
    found = tuning.evaluated(model, given, "cpu")
    for number, came in enumerate(found):
        losses, right = [], 0
        for row, label in zip(given.held_out_rows.long(), given.held_out_labels.long(), strict=True):
            (place,) = (label != IGNORED).nonzero().flatten().tolist()
            logits = model(row[:place].expand(2, 1, place))[number, 0, -1].detach()  # padding is not even there
            losses.append(nn.functional.cross_entropy(logits, label[place]))
            right += int((logits[31] > logits[30]) == (label[place] == 31))
        assert came["loss"] == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
        assert came["accuracy"] == right / len(given.held_out_rows)


@pytest.mark.usefixtures("small")
def test_the_loss_of_the_few_tokens_that_are_learnt_is_the_loss_with_its_gradient() -> None:
    model, given = tuning.stack(weights(), [1, 2], 0, "cpu"), task()
    ids, labels = (tensor[:12].view(2, 6, -1).long() for tensor in (given.rows, given.labels))
    labels[0, 0, 1] = ids[0, 0, 1]  # the models do not learn equally many
    model.learnt = 7
    losses = model.losses(ids, labels)
    losses.sum().backward()
    found = {name: param.grad for name, param in model.named_parameters()}
    model.zero_grad()
    wanted = Llamas.losses(model, ids, labels)
    wanted.sum().backward()
    torch.testing.assert_close(losses, wanted)
    for name, param in model.named_parameters():
        torch.testing.assert_close(found[name], param.grad)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("name", ["AdamW, two rates", "default", "LoRA"])
def test_a_run_in_a_stack_is_the_run_alone(name: str) -> None:
    runs = [tuning.Run("origin", name, 4, rest, matrices, seed, 6, "") for rest, matrices, seed in CASES]
    together = tuning.tune(runs, task(), weights(), "cpu")
    alone = [tuning.tune([run], task(), weights(), "cpu")[0] for run in runs]
    for one, other in zip(together, alone, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
    assert together[0]["loss"] != pytest.approx(together[1]["loss"], rel=1e-3)
    assert together[1]["loss"] != pytest.approx(together[2]["loss"], rel=1e-3)


CASES = ((1e-2, 1e-2, 1), (1e-2, 4e-2, 1), (1e-2, 4e-2, 2))


def sweep(name: str) -> Sweep:
    return Sweep("chat", CONTENDERS[name], 64 if CONTENDERS[name].has_rank else 0, SEEDS, 6, "")


def fill(results: Results, of: Sweep, points: list[Point], best: Point) -> None:
    for point in points:
        loss = abs(point.matrices - best.matrices) + abs(point.rest - best.rest) + 1.0
        for run in of.runs(point):
            results.add(run, {"loss": loss})


def test_a_grid_goes_on_only_while_its_best_point_is_at_an_edge() -> None:
    of, results = sweep("default"), Results(None)
    grid = of.grid()
    assert len(grid) == 15
    best = Point(grid[-1].matrices + 1, 0)
    fill(results, of, grid, best)
    more = of.beyond(results)
    assert more == [best, Point(best.matrices + 1, 0)]
    fill(results, of, more, best)
    sides = of.beyond(results)  # of the other rate
    assert sides == [Point(best.matrices, -1), Point(best.matrices, 1)]
    fill(results, of, sides, best)
    found = of.best(results)
    assert found is not None
    assert found[0] == best
    assert of.beyond(results) == []


def test_one_rate_is_one_rate() -> None:
    of = sweep("AdamW")
    assert all(run.rest == run.matrices for point in of.grid() for run in of.runs(point))
    results = Results(None)
    fill(results, of, of.grid(), of.grid()[0])
    assert {point.rest for point in of.beyond(results)} == {0}


def test_a_point_without_all_its_seeds_is_not_known() -> None:
    of, results = sweep("default"), Results(None)
    point = of.grid()[7]
    results.add(of.runs(point)[0], {"loss": 1.0})
    assert of.best(results) is None


def test_results_are_read_again(tmp_path: Path) -> None:
    of = sweep("LoRA")
    fill(Results(tmp_path / "tuning.jsonl"), of, of.grid(), of.grid()[7])
    again = Results(tmp_path / "tuning.jsonl")
    found = of.best(again)
    assert found is not None
    assert found[0] == of.grid()[7]
    assert dataclasses.replace(of, pretrained="another").best(again) is None
