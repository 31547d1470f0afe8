"""The OOD score of the recogniser: two ways to learn it, on top of a finished trunk.

*Consistency*: a head on pooled feature maps predicts whether the recogniser can still tell who
this is (the trunk is frozen): whether the picture's embedding stays as near to that of the clean
picture as a name takes. It is shown every degree of damage, and its target knows nobody: asked
whether *this person* would be told, a head learns the faces that its trunk was trained on, gives
them .96 and half of all strangers' good pictures less than .4.

*RTS* (Random Temperature Scaling, arXiv 2212.01015): the last stage, the embedding and a
log-variance head are trained together from a classification objective whose softmax has a
random temperature, the mean of ``ALPHA`` squared Gaussians of the predicted variance, with a
KL term to unit variance. The earlier stages stay frozen; the shipped embedding is not touched.
"""

from __future__ import annotations

import json
import random
import time
from copy import copy, deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from facelane_server.worker.networks.architectures.mobilefacenet import MobileFaceNet, TrustHead
from training.augment import background_patches, clean_batch, damage, pure_faces
from training.cameras import camera
from training.clock import Clock, cosine_rate, decay_groups, save, set_rate
from training.data import load_crops, load_photos
from training.recognizer import student_input

ALPHA = 16
KL_WEIGHT = 0.3
BEARABLE = 0.7
"""Cosine between a picture's embedding and the clean one's that leaves an even chance of a name:
two good pictures of a person lie .6 apart in the middle, and a name takes .42 among a thousand."""
SOFTNESS = 0.08
"""What is nearer by so much is told with a probability of .73."""

BANK_ROWS = 150_000
OOD_THRESHOLD = 0.4

F64 = npt.NDArray[np.float64]


def sigmoid(x: F64) -> F64:
    out: F64 = 1 / (1 + np.exp(-x))
    return out


def fit_ood(median: float, refusal: float) -> tuple[float, float]:
    """Centre and scale of the logistic that gives clean faces' ``median`` logit .9 and the
    logit ``refusal``, under which faces are refused, ``OOD_THRESHOLD``."""
    top, low = np.log(0.9 / 0.1), np.log(OOD_THRESHOLD / (1 - OOD_THRESHOLD))
    scale = (median - refusal) / float(top - low)
    return median - float(top) * scale, scale


@dataclass(frozen=True)
class Options:
    batch: int = 256
    """Faces of a step of the RTS training; of a consistency step a third of that."""
    rate: float = 2e-3
    rounds: int = 8
    """Steps of the consistency head for each batch that the trunk has read."""
    limit: int = 0


class Material:
    """Crops, identities and face-free patches on the device."""

    def __init__(self, data: Path, device: torch.device, limit: int, *, held_out: bool) -> None:
        crops = load_crops(data, held_out=held_out, limit=limit)
        self.pictures = torch.from_numpy(crops.pictures).permute(0, 3, 1, 2).contiguous().to(device)
        self.identity = torch.from_numpy(crops.identity).to(device)
        self.source = torch.from_numpy(crops.source).to(device)
        photos = load_photos(data, held_out=held_out, limit=limit)
        faces = torch.from_numpy(photos.main_face()[:, :4])
        tensor = torch.from_numpy(photos.pictures).permute(0, 3, 1, 2)
        count = 4000 if not limit else 200
        self.backgrounds = background_patches(tensor, faces, count).to(device)

    def of(self, rows: Tensor) -> Material:
        """The same with these pictures alone."""
        out = copy(self)
        out.pictures, out.identity = self.pictures[rows], self.identity[rows]
        out.source = self.source[rows]
        return out

    def draw(self, n: int) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.pictures), (n,), device=self.pictures.device)
        return self.pictures[rows], self.identity[rows]


def on_device(network: MobileFaceNet, device: torch.device) -> MobileFaceNet:
    """A frozen copy for inference, half precision on CUDA."""
    frozen = deepcopy(network).to(device, memory_format=torch.channels_last).eval()
    for parameter in frozen.parameters():
        parameter.requires_grad_(False)
    return frozen.half() if device.type == "cuda" else frozen


def forward(network: MobileFaceNet, pictures: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Embedding and maps of BGR 0..1 pictures, in the network's own precision."""
    x = student_input(pictures).to(next(network.parameters()).dtype)
    return network.trunk(x)


def map_channels(network: MobileFaceNet) -> list[int]:
    with torch.no_grad():
        like = next(network.parameters())
        _, maps = network.trunk(torch.zeros(1, 3, 112, 112, dtype=like.dtype, device=like.device))
    return [m.shape[1] for m in maps]


@torch.no_grad()
def consistency_batch(trunk: MobileFaceNet, material: Material, n: int) -> tuple[Tensor, Tensor]:
    """The head's inputs [6 n, ...] and targets [6 n] of ``n`` faces: as they are, varied, four
    times as cameras give them (half of these twice over), and damaged."""
    pictures, _ = material.draw(n)
    clean = pictures.float() / 255
    varied = pure_faces(pictures)
    seen = torch.cat(
        (
            clean,
            varied,
            camera(clean, 0.6),
            camera(varied),
            camera(varied),
            damage(varied, material.backgrounds),
        )
    )
    # As a camera's picture arrives.
    embedding, maps = forward(trunk, (seen * 255).round() / 255)
    direction = F.normalize(embedding.float())
    kept = (direction * direction[:n].repeat(6, 1)).sum(1)
    return TrustHead.summary(maps, embedding), ((kept - BEARABLE) / SOFTNESS).sigmoid()


def train_consistency(
    network: MobileFaceNet, material: Material, out: Path, clock: Clock, options: Options
) -> TrustHead:
    """A trust head for ``network`` (on the CPU, fp32), trained until ``clock`` is over."""
    torch.manual_seed(4)
    random.seed(4)
    device = material.pictures.device
    trunk = on_device(network, device)
    head = TrustHead(map_channels(network)).to(device)
    centre = torch.zeros(head.hidden.in_features, device=device)
    spread = torch.ones_like(centre)
    optimizer = torch.optim.AdamW(decay_groups(head, 0.02), lr=options.rate, betas=(0.9, 0.98))
    mean_head = deepcopy(head)
    faces = max(19, options.batch // 3)
    rows = min(BANK_ROWS, 6 * faces * 1000)
    # Reading the trunk costs a thousand times what a step of the head does: what was read is
    # kept and drawn from again.
    bank = torch.zeros(rows, len(centre), dtype=torch.float16, device=device)
    wanted = torch.zeros(rows, device=device)
    filled = 0
    log: list[dict[str, float]] = []
    begun, step = time.time(), 0
    while not clock.over or step < 4:
        summary, target = consistency_batch(trunk, material, faces)
        at = (step * len(summary) + torch.arange(len(summary), device=device)) % rows
        bank[at], wanted[at] = summary.half(), target
        filled = min(rows, filled + len(summary))
        if step < 20:
            # The first batches fix the standardisation; it is folded into the head at the end.
            first = bank[:filled].float()
            centre, spread = first.mean(0), first.std(0).clamp(min=1e-3)
        set_rate(optimizer, cosine_rate(clock.progress, options.rate))
        for _ in range(options.rounds):
            picks = torch.randint(filled, (512,), device=device)
            x = (bank[picks].float() - centre) / spread
            logit = head.out(head.act(head.hidden(x)))[:, 0]
            loss = F.binary_cross_entropy_with_logits(logit, wanted[picks])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                weight = 0.99 if step > 10 else 0.9
                for mine, theirs in zip(mean_head.parameters(), head.parameters(), strict=True):
                    mine.lerp_(theirs, 1 - weight)
        step += 1
        if step % 20 == 0:
            log.append({"step": step, "s": time.time() - begun, "loss": loss.item()})
            (out / "ood-log.json").write_text(json.dumps(log))
    print("ood", json.dumps({"consistency_steps": step, "loss": loss.item()}), flush=True)
    with torch.no_grad():
        mean_head.hidden.bias -= mean_head.hidden.weight @ (centre / spread)
        mean_head.hidden.weight /= spread
    return mean_head.eval().cpu()


class Rts(nn.Module):
    """The retrained end of the trunk with its log-variance head."""

    def __init__(self, network: MobileFaceNet, identities: int) -> None:
        super().__init__()
        # Clones hold float copies of layers whose batch norms are folded; that is no
        # obstacle to fine-tuning for a minute.
        self.stage = deepcopy(network.stages[2]).float()
        self.features = deepcopy(network.features).float()
        self.head = deepcopy(network.head).float()
        self.variance = nn.Linear(2 * 512, 1)
        nn.init.zeros_(self.variance.weight)
        nn.init.zeros_(self.variance.bias)
        self.classes = nn.Parameter(0.01 * torch.randn(identities, 512))
        for parameter in self.parameters():
            parameter.requires_grad_(True)

    def forward(self, second: Tensor) -> tuple[Tensor, Tensor]:
        """The second stage's map -> embedding [N, 512], log-variance [N]."""
        features = self.features(self.stage(second))
        flat = features.flatten(2)
        pooled = torch.cat((flat.mean(2), flat.std(2)), 1)
        return self.head(features), self.variance(pooled)[:, 0].clamp(-6, 6)


def rts_loss(rts: Rts, embedding: Tensor, log_variance: Tensor, label: Tensor) -> Tensor:
    cosine = F.normalize(embedding) @ F.normalize(rts.classes).T
    margin = 0.2 * F.one_hot(label, cosine.shape[1])
    chi = torch.randn(len(label), ALPHA, device=label.device).square().mean(1)
    temperature = (chi * log_variance.exp()).clamp(min=0.05)
    classification = F.cross_entropy(24 * (cosine - margin) / temperature[:, None], label)
    kl = 0.5 * (log_variance.exp() - 1 - log_variance).mean()
    return classification + KL_WEIGHT * kl


def train_rts(
    network: MobileFaceNet, material: Material, out: Path, clock: Clock, options: Options
) -> Rts:
    """The RTS end for ``network``, trained until ``clock`` is over; on the device."""
    torch.manual_seed(5)
    random.seed(5)
    device = material.pictures.device
    trunk = on_device(network, device)
    _, label_of = torch.unique(material.identity, return_inverse=True)
    rts = Rts(network, int(label_of.max()) + 1).to(device)
    optimizer = torch.optim.AdamW(decay_groups(rts, 0.01), lr=1e-3, betas=(0.9, 0.98))
    step, loss = 0, torch.zeros(())
    while not clock.over or step < 4:
        with torch.no_grad():
            rows = torch.randint(len(material.pictures), (options.batch,), device=device)
            clean = clean_batch(material.pictures[rows])
            both = torch.cat((clean, damage(clean, material.backgrounds)))
            _, (_, second, _) = forward(trunk, both)
            label = label_of[rows].repeat(2)
        set_rate(optimizer, cosine_rate(clock.progress, 1e-3))
        embedding, log_variance = rts(second.float())
        loss = rts_loss(rts, embedding, log_variance, label)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(rts.parameters(), 5.0)
        optimizer.step()
        step += 1
    print("ood", json.dumps({"rts_steps": step, "loss": loss.item()}), flush=True)
    save(out / "rts.pt", state=rts.state_dict(), step=step)
    return rts.eval()


@torch.inference_mode()
def score_all(
    network: MobileFaceNet, rts: Rts | None, pictures: Tensor, batch: int = 256
) -> dict[str, Tensor]:
    """``embedding`` [N, 512] normalised, and the scores [N] ``consistency`` (a logit), ``norm``
    and ``rts`` (minus log-variance), on the host. Pictures are uint8 or float 0..1, BGR."""
    rows: dict[str, list[Tensor]] = {}
    for part in pictures.split(batch):
        x = part.float() / 255 if part.dtype == torch.uint8 else part
        embedding, maps = forward(network, x)
        got = {"embedding": F.normalize(embedding.float()), "norm": embedding.float().norm(dim=1)}
        if network.ood_head is not None:
            got["consistency"] = network.ood_head(maps, embedding).float()
        if rts is not None:
            got["rts"] = -rts(maps[1].float())[1]
        for name, value in got.items():
            rows.setdefault(name, []).append(value.cpu())
    return {name: torch.cat(values) for name, values in rows.items()}
