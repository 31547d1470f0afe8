"""The detector's grounds without faces: the worst stay; and what it found before is held."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from tests.waiting import until
from torch import Tensor
from training import data, pack
from training.detector import Scenes, between, distillation_loss, held
from training.grounds import AGAIN, Grounds, drawers, most

from facelane_server.worker.networks.architectures.yunet import DenseHeads, YuNet

SIDE = 64


class _Bright(YuNet):
    """Takes a picture for a face by how bright it is."""

    def forward(self, x: Tensor) -> DenseHeads:
        told = (x.mean((1, 2, 3)) / 255)[:, None].expand(-1, 84)
        nothing = torch.zeros(len(x), 84, 4), torch.zeros(len(x), 84, 10)
        return DenseHeads(told, torch.ones_like(told), *nothing)


def plain(*tones: int) -> Tensor:
    return torch.tensor(tones, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, SIDE, SIDE)


def tones(pictures: Tensor) -> list[int]:
    return pictures[:, 0, 0, 0].tolist()


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(5)


def test_the_worst_pictures_are_kept_and_real_things_stay() -> None:
    grounds = Grounds(plain(10, 10, 10, 30, 40), real=2)
    network = _Bright()
    grounds.learn(network, plain(90, 5, 200))
    assert sorted(tones(grounds.pictures[:3])) == [10, 90, 200]
    assert tones(grounds.pictures[3:]) == [30, 40]
    grounds.learn(network, plain(100, 1))
    assert sorted(tones(grounds.pictures[:3])) == [90, 100, 200]
    grounds.learn(network, plain(*range(201, 211)))  # more than there is room
    assert sorted(tones(grounds.pictures[:3])) == [208, 209, 210]
    assert tones(grounds.pictures[3:]) == [30, 40]


def test_what_was_learnt_is_looked_at_again_and_makes_room() -> None:
    grounds = Grounds(plain(250, 250, 250))
    grounds.learn(_Bright(), plain(250, 251, 252))

    class Learnt(_Bright):
        def forward(self, x: Tensor) -> DenseHeads:
            return super().forward(torch.where(x > 240, 0.0, x))

    assert AGAIN > 16  # so often that each of three is among them
    grounds.learn(Learnt(), plain(20, 21, 22))
    assert sorted(tones(grounds.pictures)) == [20, 21, 22]


def test_half_are_picked_by_what_they_are_taken_for() -> None:
    grounds = Grounds(plain(*[0] * 50))
    grounds.learn(_Bright(), plain(255))
    [worst] = [i for i, tone in enumerate(tones(grounds.pictures)) if tone]
    share = float((grounds.pick(4000) == worst).float().mean())
    assert 0.4 < share < 0.6


def test_the_most_of_a_picture_is_its_best_anchor() -> None:
    network = YuNet(widths=(4, 8, 8, 8, 8, 8)).eval()
    pictures = torch.randint(0, 255, (3, 3, SIDE, SIDE), dtype=torch.uint8)
    with torch.no_grad():
        heads = network(pictures.float())
        torch.testing.assert_close(most(network, pictures), (heads.cls * heads.obj).amax(1))


def test_processes_draw_ever_new_pictures() -> None:
    with drawers(1, 2 * SIDE, 3) as drawing:
        lots: list[Tensor] = []

        def drew() -> bool:
            lot = drawing.taken()
            lots.extend(() if lot is None else (lot,))
            return len(lots) == 2

        until(drew)
    whole = torch.cat(lots)
    assert whole.dtype == torch.uint8
    assert whole.shape[1:] == (3, 2 * SIDE, 2 * SIDE)
    assert len(torch.unique(whole.flatten(1), dim=0)) == len(whole)


def test_bare_scenes_are_as_many_as_asked() -> None:
    photos = torch.full((4, 3, 250, 250), 128, dtype=torch.uint8)
    grounds = Grounds(torch.randint(0, 255, (6, 3, 320, 320), dtype=torch.uint8))
    for bare in (1 / 6, 1 / 2):
        for made in (Scenes.compose, Scenes.mosaic):
            _, cover, _ = made(Scenes(photos, grounds=grounds, bare=bare), 12, 96)
            assert (cover.flatten(1).amax(1) == 0).tolist()[: int(12 * bare)] == [True] * int(
                12 * bare
            )
            assert cover[int(12 * bare) :].amax() > 0


def heads(score: float, box: float) -> DenseHeads:
    return DenseHeads(
        torch.full((1, 21), score), torch.ones(1, 21),
        torch.full((1, 21, 4), box), torch.full((1, 21, 10), box),
    )  # fmt: skip


def test_what_was_found_before_is_asked_for_where_photos_lie() -> None:
    asked, score = heads(0.3, 1.0), torch.full((1, 21), 0.3)
    cover = torch.zeros(1, 1, 32, 32)
    cover[..., :16] = 1
    target, kept = held(asked, score, heads(0.5, 2.0), cover)
    fine = kept[0, :16].reshape(4, 4)
    assert torch.equal(fine, torch.tensor([[0.5, 0.5, 0.3, 0.3]] * 4))
    assert torch.equal(target.box[0, :16, 0].reshape(4, 4), 1 + (fine > 0.4).float())
    assert torch.equal(target.points[0, :16, 9].reshape(4, 4), 1 + (fine > 0.4).float())
    _, same = held(asked, score, heads(0.2, 2.0), cover)
    assert torch.equal(same, score)


def test_a_face_that_is_none_counts_more_against() -> None:
    student, teacher = heads(0.0, 0.0), heads(0.5, 0.0)
    target = torch.zeros(1, 21)
    assert distillation_loss(student, teacher, target, 2.0) == pytest.approx(
        2 * distillation_loss(student, teacher, target).item()
    )
    target += 0.8
    assert distillation_loss(student, teacher, target, 2.0) == distillation_loss(
        student, teacher, target
    )


def test_things_are_packed_without_people(tmp_path: Path) -> None:
    for folder in ("vehicles", "people"):
        (tmp_path / folder).mkdir()
        cut_out = np.zeros((60, 90, 4), np.uint8)
        cut_out[20:40, 20:70] = (10, 200, 30, 255)
        cv2.imwrite(str(tmp_path / folder / "thing.png"), cut_out)
    cv2.imwrite(str(tmp_path / "vehicles" / "whole.jpg"), np.full((90, 70, 3), 77, np.uint8))
    cv2.imwrite(str(tmp_path / "vehicles" / "small.png"), np.zeros((20, 20, 3), np.uint8))
    (tmp_path / "vehicles" / "about.txt").write_text("no picture")
    assert data.load_things(tmp_path).shape == (0, pack.THING, pack.THING, 3)
    pack.pack_things([tmp_path], tmp_path)
    things = data.load_things(tmp_path)
    assert things.shape == (2 + 8, pack.THING, pack.THING, 3)
    # The cut-out is there in its colour, and more of its ground than of it.
    green = (np.abs(things[:2].astype(int) - (10, 200, 30)).max(3) < 40).mean((1, 2))
    assert ((green > 0.05) & (green < 0.5)).all()
    assert np.abs(things[2:].astype(int) - 77).max() < 10
    assert len(data.load_things(tmp_path, limit=3)) == 3


def test_between_two_networks() -> None:
    one = {"weight": torch.tensor([1.0, 2.0]), "count": torch.tensor(3)}
    other = {"weight": torch.tensor([2.0, 0.0]), "count": torch.tensor(4)}
    middle = between(one, other, 0.25)
    assert middle["weight"].tolist() == [1.25, 1.5]
    assert int(middle["count"]) == 3
