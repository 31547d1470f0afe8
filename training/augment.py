"""What the recogniser is trained on: every batch differs, all of it made on the device."""

from __future__ import annotations

import random

import torch
import torch.nn.functional as F
from torch import Tensor

from training import imaging
from training.imaging import column, rand


def geometry(pictures: Tensor, *, strength: float = 1.0, reshape: float | None = None) -> Tensor:
    """Flip, rotate +-12 degrees, scale, shift and warp slightly. uint8 or float in, float out.

    ``reshape``: also change the face's proportions, by warps of up to 3 pixels' deviation and
    a tenth of its aspect, times this. It makes new faces of few: the teacher says whose.
    """
    x = pictures.float().div(255) if pictures.dtype == torch.uint8 else pictures
    n, size = len(x), x.shape[-1]
    grid = imaging.affine_grid(
        n,
        size,
        x,
        degrees=rand(n, -12, 12, x) * strength,
        scale=torch.exp(rand(n, -0.12, 0.12, x) * strength),
        shift=(torch.rand(n, 2, device=x.device) - 0.5) * 0.12 * strength,
        flip=torch.rand(n, device=x.device) < 0.5,
        elastic=1.0 * strength if reshape is None else rand(n, 0.2, 3.0, x) * reshape,
        aspect=None if reshape is None else torch.exp(rand(n, -0.1, 0.1, x) * reshape),
    )
    # A camera's picture goes on beyond the crop; seldom is there an edge of the frame.
    return imaging.sample(x, grid, random.choice(("reflection",) * 3 + ("zeros",)))


def _some(n: int, share: float, like: Tensor) -> Tensor:
    return torch.randperm(n, device=like.device)[: max(1, int(n * share))]


def mix(pictures: Tensor, share: float = 0.6) -> Tensor:
    """Mixup or smooth-mask cutmix between two faces for ``share`` of the batch, half each."""
    n, size = len(pictures), pictures.shape[-1]
    rows = _some(n, share, pictures)
    other = pictures[torch.randperm(n, device=pictures.device)[: len(rows)]]
    k = len(rows)
    flat = column(rand(k, 0.1, 0.9, pictures)).expand(k, 1, size, size)
    masks = torch.sigmoid(6 * imaging.smooth_field(k, 1, 4, size, pictures))
    use = column((torch.arange(k, device=pictures.device) % 2).float())
    weight = use * flat + (1 - use) * masks
    out = pictures.clone()
    out[rows] = pictures[rows] * weight + other * (1 - weight)
    return out


def photometry(pictures: Tensor) -> Tensor:
    """Gamma, contrast, colour, illumination, blur, low resolution, noise, JPEG, cutout."""
    x = pictures
    n, size = len(x), x.shape[-1]
    x = x.clamp(1e-4, 1) ** column(torch.exp(rand(n, -0.5, 0.5, x)))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(torch.exp(rand(n, -0.4, 0.3, x))) + mean
    gains = 1 + 0.12 * torch.randn(n, 3, 1, 1, device=x.device)
    x = x * gains + column(rand(n, -0.08, 0.08, x))
    rows = _some(n, 0.15, x)
    grey = x[rows].mean(1, keepdim=True)
    x[rows] = x[rows] + column(rand(len(rows), 0.3, 1.0, x)) * (grey - x[rows])
    rows = _some(n, 0.3, x)
    x[rows] = x[rows] * (1 + 0.35 * imaging.smooth_field(len(rows), 1, 3, size, x))
    x = x.clamp(0, 1)
    for _ in range(4):
        rows = _some(n, 0.05, x)
        x[rows] = imaging.gaussian_blur(x[rows], random.uniform(0.4, 2.5))
        rows = _some(n, 0.05, x)
        up = random.choice(("bilinear", "bicubic", "nearest"))
        x[rows] = imaging.low_resolution(x[rows], random.randint(18, 80), up=up)
    rows = _some(n, 0.25, x)
    x[rows] = imaging.noise(x[rows], rand(len(rows), 0.005, 0.10, x))
    rows = _some(n, 0.25, x)
    x[rows] = imaging.jpeg(x[rows], rand(len(rows), 12, 90, x))
    rows = _some(n, 0.15, x)
    x[rows] = imaging.sharpen(x[rows], rand(len(rows), 0.2, 1.2, x))
    rows = _some(n, 0.2, x)
    hole = imaging.rectangle_mask(len(rows), size, 0.15, 0.45, x)
    x[rows] = x[rows] * (1 - hole) + torch.rand(len(rows), 3, 1, 1, device=x.device) * hole
    return x


def pure_faces(pictures: Tensor) -> Tensor:
    """uint8 [N, 3, 112, 112] -> float 0..1: one person each, varied as good pictures vary."""
    return vary(geometry(pictures, strength=0.6))


def mixed_faces(pictures: Tensor, progress: float = 0.0) -> Tensor:
    """uint8 [N, 3, 112, 112] -> float 0..1: warped faces, most of them mixed of two, many spoilt.

    ``progress`` 0..1 through the training: they become milder, because pictures of one clean
    face are what is served most.
    """
    # In eighths: every other number of rows would make the convolutions tune themselves anew.
    progress = int(progress * 8) / 8
    x = mix(geometry(pictures, reshape=1 - 0.6 * progress), 0.9 - 0.3 * progress)
    good = int(len(x) * (0.3 + 0.3 * progress))
    # Mixed and pure pictures lie in random order, so that any cut holds both.
    return torch.cat((vary(x[:good]), photometry(x[good:])))


def clean_batch(pictures: Tensor) -> Tensor:
    """Harmless variety that must count as clean: jitter of alignment, light, colour, film and
    sharpness, mild compression; the aliasing of large faces that were made small."""
    return vary(geometry(pictures, strength=0.35))


def vary(pictures: Tensor) -> Tensor:
    """Light, colour, film, sharpness and mild compression as good pictures differ in them."""
    n = len(pictures)
    x = pictures.clamp(1e-4, 1) ** column(torch.exp(rand(n, -0.3, 0.3, pictures)))
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * column(torch.exp(rand(n, -0.25, 0.25, x))) + mean
    x = (x * (1 + 0.05 * torch.randn(n, 3, 1, 1, device=x.device))).clamp(0, 1)
    rows = _some(n, 0.2, x)
    x[rows] = imaging.expose(x[rows], rand(len(rows), 0.55, 1.6, x))
    rows = _some(n, 0.15, x)
    # High key: a bright room behind and around the face.
    x[rows] = 1 - (1 - x[rows]) * column(rand(len(rows), 0.5, 1.0, x))
    rows = _some(n, 0.08, x)
    x[rows] = x[rows].mean(1, keepdim=True).expand(-1, 3, -1, -1)
    rows = _some(n, 0.15, x)
    x[rows] = imaging.gaussian_blur(x[rows], random.uniform(0.3, 0.8))
    rows = _some(n, 0.45, x)
    x[rows] = imaging.sharpen(x[rows], rand(len(rows), 0.1, 2.5, x))
    rows = _some(n, 0.2, x)
    x[rows] = imaging.noise(x[rows], rand(len(rows), 0.0, 0.025, x))
    rows = _some(n, 0.25, x)
    x[rows] = imaging.jpeg(x[rows], rand(len(rows), 45, 97, x))
    return x


def damage(clean: Tensor, backgrounds: Tensor) -> Tensor:
    """Damage every picture of a batch, in every kind that the OOD heads are trained on.

    ``backgrounds`` [M, 3, 112, 112] float are patches of photos without a face. Motion
    blur, JPEG blocks and colour casts are not here: they are kept for the test.
    """
    x = clean.clone()
    n, size = len(x), x.shape[-1]
    order = torch.randperm(n, device=x.device)
    parts = iter(order.tensor_split(19))
    for _ in range(2):
        rows = next(parts)
        x[rows] = imaging.gaussian_blur(x[rows], random.uniform(1.1, 3.0))
        rows = next(parts)
        x[rows] = imaging.gaussian_blur(x[rows], random.uniform(2.5, 6.0))
        rows = next(parts)
        up = random.choice(("bilinear", "bicubic", "nearest"))
        x[rows] = imaging.low_resolution(x[rows], random.randint(7, 36), up=up)
        rows = next(parts)
        x[rows] = imaging.noise(x[rows], rand(len(rows), 0.05, 0.14, x))
    rows = next(parts)
    x[rows] = imaging.expose(x[rows], rand(len(rows), 2.0, 4.5, x), rand(len(rows), 0.5, 1, x))
    rows = next(parts)
    x[rows] = imaging.noise(x[rows], rand(len(rows), 0.1, 0.4, x))
    rows = next(parts)
    x[rows] = imaging.expose(x[rows], rand(len(rows), 0.02, 0.35, x), rand(len(rows), 1, 3, x))
    for low, high in ((0.25, 0.6), (0.4, 0.9)):
        rows = next(parts)
        hole = imaging.rectangle_mask(len(rows), size, low, high, x)
        x[rows] = x[rows] * (1 - hole) + _filling(len(rows), size, backgrounds, x) * hole
    rows = next(parts)
    hole = torch.zeros(len(rows), 1, size, size, device=x.device)
    for index in range(len(rows)):
        centre, half = random.choice(((0.46, 0.12), (0.8, 0.25), (0.2, 0.25), (0.75, 0.3)))
        top = int(size * max(0.0, centre - half + random.uniform(-0.05, 0.05)))
        bottom = int(size * min(1.0, centre + half + random.uniform(-0.05, 0.05)))
        hole[index, :, top:bottom] = 1
    x[rows] = x[rows] * (1 - hole) + _filling(len(rows), size, backgrounds, x) * hole
    rows = next(parts)
    k = len(rows)
    grid = imaging.affine_grid(
        k, size, x,
        degrees=rand(k, 25, 335, x), scale=torch.exp(rand(k, -0.2, 0.2, x)),
        shift=(torch.rand(k, 2, device=x.device) - 0.5) * 0.2,
    )  # fmt: skip
    x[rows] = imaging.sample(x[rows], grid)
    rows = next(parts)
    x[rows] = torch.rot90(x[rows], random.choice((1, 2, 2, 3)), (2, 3))
    rows = next(parts)
    k = len(rows)
    shift = (torch.rand(k, 2, device=x.device) * 0.35 + 0.2) * (
        torch.randint(0, 2, (k, 2), device=x.device) * 2 - 1
    )
    grid = imaging.affine_grid(
        k, size, x, degrees=rand(k, -20, 20, x), scale=torch.exp(rand(k, -0.8, 0.9, x)), shift=shift
    )
    x[rows] = imaging.sample(x[rows], grid)
    rows = next(parts)
    x[rows] = backgrounds[torch.randint(len(backgrounds), (len(rows),), device=x.device)]
    rows = next(parts)
    x[rows] = imaging.textures(len(rows), size, x)
    return x


def _filling(n: int, size: int, backgrounds: Tensor, like: Tensor) -> Tensor:
    plain = torch.rand(n, 3, 1, 1, device=like.device).expand(n, 3, size, size)
    patch = backgrounds[torch.randint(len(backgrounds), (n,), device=like.device)]
    kind = column(torch.randint(3, (n,), device=like.device).float())
    texture = imaging.textures(n, size, like)
    black = torch.zeros_like(plain)
    first = torch.where(kind == 0, plain, patch)
    first = torch.where(kind == 2, texture, first)
    return torch.where(column(torch.rand(n, device=like.device)) < 0.25, black, first)


def background_patches(
    photos: Tensor, faces: Tensor, n: int, size: int = 112, seed: int = 11
) -> Tensor:
    """[<= n, 3, size, size] float: patches of the photos which no face's box touches.

    ``photos`` uint8 [P, 3, H, W]; ``faces`` [P, 4] the main face (x, y, w, h). A patch is cut
    at a random side of 40..110 px, resized, and refused where it meets the enlarged box.
    """
    out: list[Tensor] = []
    draw = random.Random(seed)
    height, width = photos.shape[-2:]
    boxes = faces.tolist()
    for _ in range(8 * n):
        if len(out) == n:
            break
        index = draw.randrange(len(boxes))
        side = draw.randint(40, 110)
        left, top = draw.randint(0, width - side), draw.randint(0, height - side)
        x, y, w, h = boxes[index]
        if left < x + w and left + side > x and top < y + 1.1 * h and top + side > y - 0.2 * h:
            continue
        patch = photos[index : index + 1, :, top : top + side, left : left + side].float() / 255
        out.append(F.interpolate(patch, size=(size, size), mode="bilinear", align_corners=False)[0])
    return torch.stack(out)
