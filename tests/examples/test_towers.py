"""The recipe of two towers: its data, its tower and what it counts as right."""

from __future__ import annotations

import importlib
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

emoji = pytest.importorskip("emoji", reason="the examples' requirements are not installed")
pytest.importorskip("tyro", reason="the examples' requirements are not installed")

recipe = importlib.import_module("examples.towers.__main__")
names = importlib.import_module("examples.towers.names")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def data() -> Any:
    return names.load("names", None, 40)


def texts(part: Any, language: str) -> list[str]:
    codes = part.codes[:, part.languages.index(language)].tolist()
    return ["".join(chr(c) for c in row if c) for row in codes]


def test_every_emoji_is_in_one_part_with_its_skin_tones() -> None:
    data = names.load("names", None, None)
    train, test = texts(data.train, "en"), texts(data.test, "en")
    qualified = emoji.STATUS["fully_qualified"]
    known = [v["en"].strip(":") for v in emoji.EMOJI_DATA.values() if v["status"] == qualified]
    assert sorted(train + test) == sorted(f" {name.replace('_', ' ').casefold()} " for name in known)
    assert 900 <= len(test) <= 1000
    assert not set(train) & set(test)
    for base, count in {"waving hand": 6, "woman astronaut": 6, "handshake": 26}.items():
        found = [sum(name.startswith(f" {base} ") for name in part) for part in (train, test)]
        assert sorted(found) == [0, count], base  # with skin tones and without
    toned = [bool(label) for label in data.test.labels == names.TONED]
    assert toned == ["skin tone" in name for name in test]


def test_parts_do_not_change(data: Any) -> None:
    again = names.load("names", None, 40)
    assert torch.equal(again.test.codes, data.test.codes)
    assert again.train[torch.arange(3)].shape == (3, 14, 40)
    assert again.train[torch.arange(3)].dtype == torch.int64


def test_pairs_of_a_file_with_an_equal_name_stay_together(tmp_path: Path) -> None:
    rows = [f"word {i // 2}\tmot {i if i % 4 else 10**6 + i // 8}" for i in range(80)]
    (tmp_path / "pairs.tsv").write_text("\n".join(["en\tfr", *rows]))
    data = names.load("pairs", tmp_path / "pairs.tsv")
    assert data.train.languages == ("en", "fr")
    assert 0 < len(data.test) <= 20
    assert len(data.train) + len(data.test) == 80
    for language in ("en", "fr"):
        assert not set(texts(data.train, language)) & set(texts(data.test, language))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "two or more languages"),
        ("en\n" + "a\n" * 9, "two or more languages"),
        ("en\tfr\n" + "a\tb\n" * 3, "has 3 rows"),
        ("en\tfr\n" + "a\tb\n" * 9 + "a\n", "line 11"),
        ("en\tfr\n" + "a\tb\n" * 9 + "a\t \n", "line 11"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, content: str, said: str) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_text(content)
    with pytest.raises(ValueError, match=said) as error:
        names.load("pairs", path)
    assert str(path) in str(error.value)


def test_a_file_whose_names_are_all_tied_is_refused(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("en\tfr\n" + "a\tb\n" * 9)
    with pytest.raises(ValueError, match="9 names of 1 families"):
        names.load("pairs", tmp_path / "pairs.tsv")


def test_bad_arguments_are_named(tmp_path: Path, data: Any) -> None:
    with pytest.raises(ValueError, match="root is needed"):
        names.load("pairs")
    with pytest.raises(FileNotFoundError, match="root="):
        names.load("pairs", tmp_path / "none.tsv")
    with pytest.raises(ValueError, match="name='mnist'"):
        names.load("mnist")
    with pytest.raises(ValueError, match="size=2"):
        names.load("names", None, 2)
    for languages in (("xx",), ("en",), (), ("es", "es")):
        with pytest.raises(ValueError, match="language="):
            data.train.columns(languages)


def test_hashes_are_those_of_whole_n_grams() -> None:
    codes = torch.tensor([[5, 6, 5, 6, 0, 0], [9, 5, 6, 0, 0, 0]])
    found = recipe.hashes(codes, 3, 1 << 20)
    assert found.shape == (2, 6 + 5 + 4)
    assert (found[0] > 0).sum() == 4 + 3 + 2
    assert len(set(found[0].tolist()) - {0}) == 2 + 2 + 2  # 5 6, 56 65, 565 656
    shared = set(found[0].tolist()) & set(found[1].tolist()) - {0}
    assert len(shared) == 3  # 5, 6, 56
    assert recipe.hashes(codes, 3, 7).max() < 7


def test_ranks_count_equal_names_as_right_and_ties_as_wrong() -> None:
    x, y = torch.tensor([[1.0, 0], [1, 0], [0, 1]]), torch.tensor([[0.0, 1], [1, 0], [1, 0]])
    one, two, three = [1, 0], [2, 0], [3, 0]
    # right for the first name are the answers one (similarity 0) and two (1); three (1) is as near
    places = recipe.ranks(x, torch.tensor([one, one, two]), y, torch.tensor([one, two, three]))
    assert places.tolist() == [1, 2]
    places = recipe.ranks(x, torch.tensor([one, one, two]), y, torch.tensor([one, two, two]))
    assert places.tolist() == [0, 1]
    places = recipe.ranks(x, torch.tensor([one, two, three]), y, torch.tensor([one, two, three]))
    assert places.tolist() == [2, 1, 2]


@pytest.mark.parametrize("name", ["clip", "supcon"])
@pytest.mark.parametrize("language", [("es",), ("es", "ja")])
def test_eager_formula_gives_the_same_first_steps(name: str, language: tuple[str, ...], data: Any) -> None:
    steps = {}
    for formula in ("cl_kernels", "eager"):
        settings = replace(
            recipe.PRESETS["cpu"], formula=formula, language=language, batch=32, width=8, buckets=256
        )
        trainer = recipe.RECIPE.trainer(settings, name, data, CPU)
        losses = [trainer.step()["loss"] for _ in range(2)]
        steps[formula] = losses, [p.grad for p in trainer.method.parameters()]
    (losses, grads), (expected, expected_grads) = steps.values()
    assert losses == pytest.approx(expected, rel=1e-6)
    for grad, other in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-6)


def test_scale_is_learnt_up_to_100_and_not_decayed(data: Any) -> None:
    settings = replace(recipe.PRESETS["cpu"], batch=32, width=8, buckets=256, warmup=0)
    trainer = recipe.RECIPE.trainer(settings, "clip", data, CPU)
    method = trainer.method
    assert trainer.step()["scale"] == pytest.approx(1 / 0.07)
    assert method.log_scale.item() != pytest.approx(math.log(1 / 0.07), abs=1e-4)
    with torch.no_grad():
        method.log_scale.fill_(math.log(100.0) + 1e-3)
    trainer.step()
    assert method.log_scale.item() <= math.log(100.0) + 1e-6
    undecayed = [g["params"] for g in trainer.optimizer.param_groups if g["weight_decay"] == 0]
    assert {p.ndim for group in undecayed for p in group} == {0, 1}
    assert sum(p.ndim < 2 for p in method.parameters()) == sum(map(len, undecayed))
