"""From an image back to what G would make it from: inversion, and super-resolution by search.

`invert` looks for the latent and the class embedding whose image is likest a given one, by
optimization from several starts (Zhu et al. 2016, arXiv 1609.03552). `upscale` looks for images
that come down to a given small one (PULSE, Menon et al., CVPR 2020, arXiv 2003.03808, section 3):
what it adds is what G has learned of such images, and need not be what was there.

A latent stays on the sphere on which it was drawn, of radius about sqrt(z_dim), for nearly all of a
normal distribution in many dimensions lies there (PULSE). A small generator does not come near
enough to every image so; therefore the class embedding may leave its class too, at a price. What
chose the optimizer, the losses and the constants is in `benchmarks/README.md`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from biggan.errors import UserError
from biggan.latents import Stream, check_seed, rng
from biggan.networks import Generator
from biggan.pixels import from_uint8, to_uint8
from biggan.recipe import Recipe

POOL = 64
"""Images drawn of which the likest are the starts; more where there are more classes, to have one
of each."""
POOL_PART = 16
"""So many are drawn before it is asked whether to stop."""
STEPS = 200
LEARNING_RATES = 0.3, 0.1
"""Adam's for the latent and for the class embedding's shift, falling to 0 along a cosine."""
BETAS = 0.9, 0.9
SHIFT_WEIGHT = 1e-3
"""Price of a mean square of 1 of the shift, measured in the embedding's own root mean square."""
SSIM_WEIGHT = 0.01
SCALES = 1, 2, 4
"""Images are compared at their full size, a half and a quarter."""
REPORT_EVERY = 10
FACTORS = 2, 4, 8


@dataclass(frozen=True)
class Progress:
    """How far a search is."""

    step: int
    steps: int
    loss: float
    """That of the best candidate so far."""
    psnr: float
    """That of the best candidate's image, as in `Inversion.psnr`."""
    image: np.ndarray
    """The best candidate's: uint8 `[H, W, C]`."""
    recipe: Recipe
    """What makes that image but for rounding, as in `Inversion.recipes`."""


@dataclass(frozen=True)
class Inversion:
    """What a search found, the best first."""

    images: np.ndarray
    """uint8 `[candidates, H, W, C]`: what `biggan.synthesis.synthesize` makes of the recipes."""
    recipes: tuple[Recipe, ...]
    """Each with its latent `z`, its embedding `y`, and the class that it started from."""
    losses: tuple[float, ...]
    """What was minimized, of each: ascending."""
    psnr: tuple[float, ...]
    """PSNR in dB of each image, brought to the size of what was given, to what was given."""


OnStep = Callable[[Progress], None]
"""Is told of progress every `REPORT_EVERY` steps, and with the last; what it raises ends the search
with nothing."""
Stop = Callable[[], bool]
"""Is asked before every step; if it says so, that is the last, and what is found by then counts."""


def never() -> bool:
    """Lets a search take all its steps."""
    return False


def invert(
    G: Generator,
    image: np.ndarray,
    *,
    class_ids: Sequence[int] | None = None,
    candidates: int = 4,
    steps: int = STEPS,
    seed: int = 0,
    truncation: float | None = None,
    on_step: OnStep | None = None,
    stop: Stop = never,
) -> Inversion:
    """Latents of G whose images are likest `image`, uint8 `[resolution, resolution, channels]`.

    Likeness is one of pixels (squared differences, of the images and of smaller copies) and of
    structure (SSIM). `class_ids` are the classes to start from, by default all: the class is then
    found. `truncation` chooses the batch-norm moments, and the sphere of latents so truncated. A
    seed gives the same result again. G must be in evaluation mode, and is left as it is. Raises
    `UserError` for an image of another shape, and for anything out of range.
    """
    _check_pixels("the image", image, G.resolution, G.channels)
    ids = range(G.n_classes) if class_ids is None else class_ids
    options = candidates, steps, seed, truncation, on_step, stop
    return _Search(G, image, 1, _unlikeness, ids, *options).run()


def upscale(
    G: Generator,
    small: np.ndarray,
    *,
    factor: int,
    class_ids: Sequence[int] | None = None,
    candidates: int = 4,
    steps: int = STEPS,
    seed: int = 0,
    on_step: OnStep | None = None,
    stop: Stop = never,
) -> Inversion:
    """Images of G that `downsample` by `factor` (2, 4 or 8) makes `small`, uint8 `[h, w, C]`.

    `small` is `resolution / factor` pixels wide and high. Several candidates are several images
    that it may be of. All else is as in `invert`; the latents are untruncated.
    """
    if factor not in FACTORS:
        raise UserError(f"factor {factor}: must be 2, 4 or 8; make the image smaller for others")
    what = f"an image to be enlarged {factor} times"
    _check_pixels(what, small, G.resolution // factor, G.channels)
    ids = range(G.n_classes) if class_ids is None else class_ids
    options = candidates, steps, seed, None, on_step, stop
    return _Search(G, small, factor, _squared_difference, ids, *options).run()


def downsample(images: np.ndarray, factor: int) -> np.ndarray:
    """Images `[..., H, W, C]` (uint8) with a pixel for every `factor` x `factor`: their mean.

    Each pixel counts in one small pixel alone, and all alike. Raises `UserError` unless `factor`
    divides both sides.
    """
    *batch, height, width, channels = images.shape
    if factor < 1 or height % factor or width % factor:
        raise UserError(f"factor {factor}: must divide the image's sides, {width} and {height}")
    boxes = images.reshape(*batch, height // factor, factor, width // factor, factor, channels)
    means: np.ndarray = np.rint(boxes.mean(axis=(-4, -2))).astype(np.uint8)
    return means


def psnr(images: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of uint8 images in dB.

    Of equal ones 58.9, for that is what rounding to grey levels leaves: 1/12 of one, squared error.
    """
    error = np.square(images.astype(np.float64) - reference).mean()
    return 10 * math.log10(255**2 / max(error, 1 / 12))


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity of images in [-1, 1], `[N, C, H, W]`: `[N]`, 1 where they are equal.

    Wang et al. 2004, with their constants; the Gaussian window (sigma 1.5) is 7 pixels wide for
    their 11, because images may be as small as 8.
    """
    place = torch.arange(7, device=a.device, dtype=a.dtype) - 3
    window = F.normalize(torch.exp(-place.square() / (2 * 1.5**2)), p=1, dim=0)
    kernel = (window[:, None] * window).expand(a.shape[1], 1, 7, 7)

    def blur(x: Tensor) -> Tensor:
        return F.conv2d(x, kernel, groups=x.shape[1])

    mean_a, mean_b = blur(a), blur(b)
    variances = blur(a * a) - mean_a**2 + blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * (2 * covariance + c2) / (variances + c2)).mean((1, 2, 3))


def _squared_difference(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().mean((1, 2, 3))


def _unlikeness(a: Tensor, b: Tensor) -> Tensor:
    pixels = [_squared_difference(F.avg_pool2d(a, k), F.avg_pool2d(b, k)) for k in SCALES]
    return torch.stack(pixels).sum(0) + SSIM_WEIGHT * (1 - ssim(a, b.expand_as(a)))


def _check_pixels(what: str, pixels: np.ndarray, side: int, channels: int) -> None:
    wanted = (side, side, channels)
    if pixels.shape != wanted or pixels.dtype != np.uint8:
        raise UserError(
            f"{what} is {pixels.dtype} {list(pixels.shape)}, must be uint8 {list(wanted)} for this"
            " model: resize or convert it"
        )


@dataclass(frozen=True)
class _Search:
    """All candidates are optimized as one batch, in which none minds the others."""

    G: Generator
    pixels: np.ndarray
    """What images are to match once their sides are divided by `factor`: uint8 `[h, w, C]`."""
    factor: int
    distance: Callable[[Tensor, Tensor], Tensor]
    """How far each of `[N, C, h, w]` is from `[1, C, h, w]`: `[N]`."""
    class_ids: Sequence[int]
    candidates: int
    steps: int
    seed: int
    truncation: float | None
    on_step: OnStep | None
    stop: Stop

    def __post_init__(self) -> None:
        if not self.class_ids:
            raise UserError("no classes given: name one or more, or leave them out to try all")
        self.G.check_classes(self.class_ids)
        for name in ("candidates", "steps"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, must be 1 or more")

    @torch.inference_mode(False)  # Wherever it is called: this needs gradients.
    def run(self) -> Inversion:
        """The search, from its starts to its recipes."""
        G = copy.deepcopy(self.G).eval().requires_grad_(False)
        G.freeze()
        wanted = from_uint8(torch.tensor(self.pixels)).permute(2, 0, 1)[None].to(G.device)

        def distances(images: Tensor) -> Tensor:
            return self.distance(F.avg_pool2d(images, self.factor), wanted)

        z, classes = self._starts(G, distances)
        radius = z.norm(dim=1, keepdim=True)
        home = G.embed(classes)
        unit = home.square().mean(1, keepdim=True).sqrt()
        shift = torch.zeros_like(home).requires_grad_()

        def look() -> tuple[Tensor, Tensor]:
            images = G.synthesize(z, home + unit * shift, self.truncation)
            return images, distances(images) + SHIFT_WEIGHT * shift.square().mean(1)

        rates = zip((z.requires_grad_(), shift), LEARNING_RATES, strict=True)
        optimizer = torch.optim.Adam([{"params": [x], "lr": lr} for x, lr in rates], betas=BETAS)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        for step in range(1, self.steps + 1):
            last = self.stop() or step == self.steps
            images, losses = look()
            if self.on_step and (last or step % REPORT_EVERY == 0):
                # Before the optimizer's step, which moves the latents that these images are of.
                now = images, losses, z, home + unit * shift, classes
                self.on_step(self._progress(step, *(x.detach() for x in now)))
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                z.mul_(radius / z.norm(dim=1, keepdim=True))
            if last:
                break
        with torch.no_grad():
            losses, best = look()[1].sort(stable=True)
            return self._result(z[best], (home + unit * shift)[best], classes[best], losses)

    @torch.no_grad()
    def _starts(self, G: Generator, distances: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """The likest of random images of the classes: latents and class ids."""
        n = max(POOL, len(self.class_ids), self.candidates)
        seeds = rng(check_seed(self.seed), Stream.SAMPLE, 1).integers(2**63, size=n).tolist()
        z = G.latents(seeds, self.truncation).to(G.device)
        classes = torch.tensor(self.class_ids).repeat(-(-n // len(self.class_ids)))[:n].to(G.device)
        found: list[Tensor] = []
        size = min(G.sample_batch, POOL_PART)
        for part, ids in zip(z.split(size), classes.split(size), strict=True):
            found.append(distances(G(part, ids, self.truncation)))
            if size * len(found) >= self.candidates and self.stop():
                break
        best = torch.cat(found).argsort(stable=True)[: self.candidates]
        return z[best], classes[best]

    def _progress(
        self, step: int, images: Tensor, losses: Tensor, z: Tensor, y: Tensor, classes: Tensor
    ) -> Progress:
        best = int(losses.argmin())
        image = to_uint8(images[best]).permute(1, 2, 0).cpu().numpy()
        [recipe] = self._recipes(z[[best]], y[[best]], classes[[best]])
        return Progress(step, self.steps, float(losses[best]), self._psnr(image), image, recipe)

    def _result(self, z: Tensor, y: Tensor, classes: Tensor, losses: Tensor) -> Inversion:
        # By G itself and not by the copy, whose weights are the same but for rounding.
        images = self.G.render_embedded(z, y, [self.truncation] * len(z))
        recipes = self._recipes(z, y, classes)
        return Inversion(images, recipes, tuple(losses.tolist()), tuple(map(self._psnr, images)))

    def _recipes(self, z: Tensor, y: Tensor, classes: Tensor) -> tuple[Recipe, ...]:
        return tuple(
            Recipe(classes={class_id: 1.0}, z=tuple(z), y=tuple(y), truncation=self.truncation)
            for z, y, class_id in zip(z.tolist(), y.tolist(), classes.tolist(), strict=True)
        )

    def _psnr(self, image: np.ndarray) -> float:
        return psnr(downsample(image, self.factor), self.pixels)
