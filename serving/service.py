"""What the endpoint does, apart from HTTP: each operation from a checked request to its answer."""

from __future__ import annotations

import asyncio
import math
import secrets
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

import numpy as np
from pydantic import BaseModel

from biggan.classes import UnknownClassError, nearest_class
from biggan.directions import Directions
from biggan.errors import UserError
from biggan.inversion import FACTORS, Progress
from biggan.provenance import Verdict, altered, describe, lay_out, read_origin
from biggan.recipe import MAX_SIDE, Recipe
from biggan.reproduction import REFERENCE
from biggan.storage import StorageError
from serving import recipes
from serving.batching import Busy
from serving.catalogue import Catalogue, Model
from serving.encoding import (
    MAX_MOTION_PIXELS,
    MAX_SIDES,
    Answer,
    Made,
    base64_text,
    columns_of,
    encode,
    encode_motion,
    picture_file,
    single_files,
)
from serving.ingress import FULL
from serving.keys import Key
from serving.limits import Admission, Refusal
from serving.problems import ProblemError
from serving.schemas import (
    MAX_FRAMES,
    B64Image,
    ClassEntry,
    ClassesAnswer,
    DirectionEntry,
    DirectionsAnswer,
    EditRequest,
    Found,
    FoundAnswer,
    GenerateRequest,
    ImagesRequest,
    ImagesResponse,
    InterpolateRequest,
    InvertRequest,
    ModelEntry,
    ModelsAnswer,
    Observed,
    UpscaleRequest,
    VerifyAnswer,
    VerifyRequest,
)
from serving.schemas import Progress as Step
from serving.searcher import Result, Task
from serving.uploads import Decoder, decode_base64

MOTION_THREADS = 2
MAX_PENDING_PIXELS = 4 * MAX_MOTION_PIXELS
"""Of images that are asked for, or wait to be encoded: where that is slower than making them, they
would fill the memory. As RGB they are 800 MB."""
START_SECONDS = 600.0
"""So long images are waited for: the first sampler may need a new machine."""
GRACE_SECONDS = 10.0
"""So long after its deadline a search may take to its first news: a model may have to be loaded."""
NOTHING_OBSERVED = Observed(requests=0, error_rate=0.0, p50_ms=None, p95_ms=None)


class Painter(Protocol):
    """Who makes images: `serving.sampler.Sampler`, here or behind a handle."""

    def full(self, version: str, images: int, others: int) -> Busy | None:
        """That there is no room for so many images, where that is known without asking.

        `others` were wanted too, and turned away before they came here.
        """

    async def synthesize(self, version: str, recipes: Sequence[Recipe]) -> np.ndarray | Busy:
        """The images of recipes, or that there is no room for them."""

    async def walk(
        self, version: str, stops: Sequence[Recipe], frames: int, loop: bool
    ) -> list[Recipe]:
        """The recipes of the frames between images."""

    async def embedding(self, version: str, classes: Mapping[int, float]) -> list[float]:
        """The embedding of a mixture of classes."""

    async def directions(self, version: str) -> Directions:
        """The directions of a model."""


@dataclass
class Caller:
    """Who asks, and for how many who could not; and what for, as it turns out."""

    key: Key | None
    """None where everybody is let in."""
    turned_away: int = 0
    """Requests like this one that the gate in HAProxy turned away since the one before."""
    model: str = ""
    """NAME@VERSION that the request gets, once that is known."""
    images: int = 0
    """That were made."""


class Seeker(Protocol):
    """Who searches: `serving.searcher.Searcher`, here or behind a handle."""

    def search(self, task: Task) -> AsyncGenerator[Progress | Result, None]:
        """How far a search is, from time to time, and last what it found."""


class Counts(Protocol):
    """Who counts: `serving.ledger.Ledger`, here or behind a handle."""

    async def take(self, key: Key, images: int) -> Admission | Refusal:
        """Count images to be made with a key, or refuse them."""

    async def give_back(self, key: Key, images: int) -> None:
        """Count no more what was taken for work that failed."""

    async def observed(self) -> dict[str, Observed]:
        """How each model version fared of late, by NAME@VERSION."""

    async def metrics(self) -> bytes:
        """All counts in Prometheus' text format."""


class Service:
    """The endpoint's operations."""

    def __init__(
        self, catalogue: Catalogue, painter: Painter, seeker: Seeker, counts: Counts
    ) -> None:
        """Serve the models of `catalogue` with what `painter` makes and `seeker` finds."""
        self.catalogue, self.painter = catalogue, painter
        self.seeker, self.counts = seeker, counts
        self.decoder = Decoder()
        # Animations take seconds; in threads of their own they keep no picture waiting.
        self._motion = ThreadPoolExecutor(MOTION_THREADS, "motion")
        self._pixels = 0
        self._ready = ""

    async def generate(self, caller: Caller, request: GenerateRequest) -> tuple[Made, Answer]:
        """Images of a class."""
        seed = secrets.randbelow(2**31) if request.seed is None else request.seed
        model = await self._find(caller, request.model, seed)
        columns = _columns(request, request.n, math.ceil(math.sqrt(request.n)), model)
        wanted = recipes.generated(request, seed, model)
        async with self._place(caller, model, request.n):
            made = await self._make(model, wanted)
            answer = await asyncio.to_thread(encode, made, request.format, request.layout, columns)
        return made, answer

    async def interpolate(self, caller: Caller, request: InterpolateRequest) -> tuple[Made, Answer]:
        """The way from image to image."""
        legs = len(request.stops) - (0 if request.loop else 1)
        frames_in_all = legs * request.frames + (0 if request.loop else 1)
        if frames_in_all > MAX_FRAMES:
            limit = f"that is {frames_in_all} frames, more than {MAX_FRAMES} in all"
            recipes.refuse("frames", request.frames, limit)
        model = await self._find(caller, request.model, _draw(request, request.stops[0].seed))
        if model.config.resolution * request.scale > MAX_SIDE:
            limit = f"{model.config.resolution} pixels may grow to {MAX_SIDE}"
            recipes.refuse("scale", request.scale, limit)
        if frames_in_all * (model.config.resolution * request.scale) ** 2 > MAX_MOTION_PIXELS:
            limit = f"{frames_in_all} frames have more than {MAX_MOTION_PIXELS:,} pixels in all"
            field = "scale" if request.scale > 1 else "frames"
            recipes.refuse(field, getattr(request, field), limit)
        stops = recipes.stops(request.stops, request.truncation, model)
        async with self._place(caller, model, frames_in_all, request.scale):
            frames = await self.painter.walk(model.reference, stops, request.frames, request.loop)
            made = await self._make(model, frames)
            answer = await asyncio.get_running_loop().run_in_executor(
                self._motion, lambda: _motion(made, request)
            )
        return made, answer

    async def edit(self, caller: Caller, request: EditRequest) -> tuple[Made, Answer]:
        """An image changed along directions, and towards a class."""
        model = await self._find(caller, request.model, _draw(request, request.image.seed))
        columns = _columns(request, request.steps, request.steps, model)
        async with self._place(caller, model, request.steps):
            towards = None
            if request.morph and request.image.y is not None:
                classes = recipes.morph_classes(request, model)
                towards = await self.painter.embedding(model.reference, classes)
            made = await self._make(model, recipes.edited(request, model, towards))
            answer = await asyncio.to_thread(encode, made, request.format, request.layout, columns)
        return made, answer

    async def search(
        self, caller: Caller, request: InvertRequest | UpscaleRequest
    ) -> AsyncGenerator[Step | FoundAnswer, None]:
        """The latent of an image, or images whose small picture it is; progress, then the answer.

        Closed before its end, it ends the search.
        """
        began = time.monotonic()
        model = await self._find(caller, request.model, _draw(request, None))
        wanted = None if request.class_ is None else recipes.mixture("class", request.class_, model)
        image, factor = await self._upload(request, model)
        task = Task(
            version=model.reference,
            image=image,
            factor=factor,
            class_ids=None if wanted is None else tuple(wanted),
            candidates=request.candidates,
            seed=request.seed,
            until=time.time() + request.deadline - (time.monotonic() - began),
        )
        async with aclosing(self.seeker.search(task)) as news:
            async with self._admitted(caller.key, request.candidates):
                item = await _first(news, request.deadline)
            # From here on the search has cost what it costs, whoever leaves or does not listen.
            while not isinstance(item, Result):
                yield await asyncio.to_thread(_step, model, item)
                item = await anext(news)
            caller.images = len(item.inversion.recipes)
            yield await asyncio.to_thread(_found, model, item, time.monotonic() - began)

    async def _upload(
        self, request: InvertRequest | UpscaleRequest, model: Model
    ) -> tuple[np.ndarray, int]:
        """The uploaded image as the search wants it, and by how much it is to be enlarged."""
        data = decode_base64(request.image, "image")
        mode: Literal["L", "RGB"] = "L" if model.config.channels == 1 else "RGB"
        side = model.config.resolution
        if isinstance(request, InvertRequest):
            return await self.decoder.decode(data, mode=mode, side=side), 1
        # Only its size is of use: EXIF may have it turned.
        image = await self.decoder.decode(data, mode=mode)
        fitting = [f for f in FACTORS if f * max(image.shape[:2]) <= side]
        factor: int = request.factor or max(fitting, default=FACTORS[0])
        if side // factor < 2:
            recipes.refuse("factor", factor, f"would leave less than 2 of {side} pixels")
        return await self.decoder.decode(data, mode=mode, side=side // factor), factor

    async def verify(self, caller: Caller, request: VerifyRequest) -> VerifyAnswer:
        """Whether an image came from the models that are served."""
        data = decode_base64(request.image, "image")
        async with self._admitted(caller.key, 1):  # To read a file is work, whatever it says.
            # Even of a file with no origin it is looked whether it is an image at all.
            await self.decoder.decode(data, mode="RGB")
            origin = await asyncio.to_thread(read_origin, data)
        if origin is None:
            return VerifyAnswer(status="no origin", detail="says nothing of where it came from")
        try:
            if not REFERENCE.fullmatch(origin.model):
                raise ProblemError(404, f"model {origin.model[:100]} is not served here")
            model = await self._find(caller, origin.model)
        except ProblemError as error:
            if error.status != 404:
                raise
            return _verdict(Verdict(status="unknown model", origin=origin, sentence=error.detail))
        if model.weights != origin.weights:
            sentence = f"{model.reference} of this store has other weights than the picture names"
            return _verdict(Verdict(status="unknown model", origin=origin, sentence=sentence))
        origin = origin.named_by(model.config.class_names)
        if len(origin.recipes) > MAX_FRAMES:
            sentence = f"names more than {MAX_FRAMES} images: too many to be made again here"
            return _verdict(Verdict(status="claimed", origin=origin, sentence=sentence))
        side = model.config.resolution
        nothing = np.empty((0, side, side, model.config.channels), np.uint8)
        verdict = await self.decoder.compare(origin, data, nothing)
        if verdict is None:
            try:
                async with self._place(caller, model, len(origin.recipes)):
                    made = await self._make(model, list(origin.recipes))
            except StorageError:  # That is not the file's fault, and names the store.
                raise
            except UserError as error:  # Whoever wrote the file could write anything.
                return _verdict(altered(origin, f"that model cannot have made it: {error}"))
            verdict = await self.decoder.compare(origin, data, made.images)
        assert verdict
        return _verdict(verdict)

    async def images(self, caller: Caller, request: ImagesRequest) -> ImagesResponse:
        """What the widely used images API asks for."""
        size = _size(request)
        seed = secrets.randbelow(2**31)
        model = await self._find(caller, request.model, seed)
        names = model.config.class_names
        try:
            wanted = await asyncio.to_thread(nearest_class, request.prompt, names)
        except UnknownClassError as error:
            recipes.refuse("prompt", request.prompt, str(error))
        n = request.n or 1
        async with self._place(caller, model, n):
            made = await self._make(
                model, [Recipe(classes={wanted: 1.0}, seed=seed + i) for i in range(n)]
            )
            return await asyncio.to_thread(_images_response, made, request, size)

    async def models(self, caller: Caller) -> ModelsAnswer:
        """Every version of the models that the caller may use, and how it fared of late."""
        observed = await self.counts.observed()
        key, found = caller.key, await self.catalogue.all()
        return ModelsAnswer(
            data=[_entry(*one, observed) for one in found if not key or key.may_use(one[0].name)]
        )

    async def model(self, caller: Caller, reference: str) -> ModelEntry:
        """One of them."""
        wanted = (await self._find(caller, reference)).reference
        for entry in (await self.models(caller)).data:
            if entry.id == wanted:
                return entry
        raise ProblemError(404, f"{wanted} is no longer in the store")

    async def ready(self) -> str:
        """NAME@VERSION of the default model, which has been loaded by then.

        Asked once a version: who asks again and again must not keep an idle sampler from leaving.
        """
        model = await self.catalogue.find(None)
        if model.reference != self._ready:
            await self.painter.directions(model.reference)
            self._ready = model.reference
        return model.reference

    async def classes(self, caller: Caller, model: str | None) -> ClassesAnswer:
        """The classes that can be asked for."""
        found = await self._find(caller, model)
        entries = [ClassEntry(id=i, name=name) for i, name in enumerate(found.config.class_names)]
        return ClassesAnswer(model=found.reference, classes=entries)

    async def directions(self, caller: Caller, model: str | None) -> DirectionsAnswer:
        """The directions in which a model's images can be changed."""
        found = await self._find(caller, model)
        directions = await self.painter.directions(found.reference)
        return DirectionsAnswer(
            model=found.reference,
            directions=[
                DirectionEntry(
                    index=i,
                    name=found.direction_names.get(i, str(i)),
                    stage=directions.stages[i],
                    effect=effect,
                )
                for i, effect in enumerate(directions.effects.tolist())
            ],
        )

    async def metrics(self, caller: Caller) -> bytes:
        """What `Counts.metrics` tells; raises `ProblemError` 403 for a key of some models only."""
        if caller.key and caller.key.models is not None:
            detail = "metrics tell of all models, and this API key is for some alone"
            raise ProblemError(403, detail)
        return await self.counts.metrics()

    async def _find(self, caller: Caller, reference: str | None, draw: int = 0) -> Model:
        """The model of a request; raises `ProblemError` 404, or 403 if the key may not use it."""
        model = await self.catalogue.find(reference, draw)
        caller.model = model.reference
        if caller.key:
            caller.key.check_model(model.name)
        return model

    @asynccontextmanager
    async def _place(
        self, caller: Caller, model: Model, images: int, scale: int = 1
    ) -> AsyncIterator[None]:
        """Room for images, from before they are made until they are encoded `scale` times as large.

        They are counted for the key. Raises `ProblemError` 403 or 429 as it has it, 503 without
        room.
        """
        if busy := self.painter.full(model.reference, images, caller.turned_away * images):
            raise too_busy(busy.seconds, busy.many)  # Nothing to count, then.
        pixels = images * (model.config.resolution * scale) ** 2
        if self._pixels and self._pixels + pixels > MAX_PENDING_PIXELS:
            raise too_busy(1.0)
        self._pixels += pixels
        try:
            async with self._admitted(caller.key, images):
                yield
        finally:
            self._pixels -= pixels
        caller.images = images

    async def _make(self, model: Model, wanted: list[Recipe]) -> Made:
        """Their images; raises `ProblemError` 503 if samplers have no room, or there is none."""
        try:
            async with asyncio.timeout(START_SECONDS):
                images = await self.painter.synthesize(model.reference, wanted)
        except TimeoutError:
            raise too_busy() from None
        if isinstance(images, Busy):
            raise too_busy(images.seconds)
        return Made(model, wanted, images)

    @asynccontextmanager
    async def _admitted(self, key: Key | None, images: int) -> AsyncIterator[None]:
        """Count images for a key, unless making them fails; raises `ProblemError` 403 or 429.

        Whoever leaves is not given them back: by then they are being made.
        """
        if key is None:
            yield
            return
        answer = await self.counts.take(key, images)
        if isinstance(answer, Refusal):
            raise answer.problem()
        try:
            yield
        except Exception:
            await self.counts.give_back(key, images)
            raise


def _columns(request: GenerateRequest | EditRequest, n: int, row: int, model: Model) -> int:
    if request.layout != "grid" or request.format not in MAX_SIDES:
        return request.columns or row
    return columns_of(n, request.columns, row, model.config.resolution, request.format)


async def _first(
    news: AsyncGenerator[Progress | Result, None], deadline: float
) -> Progress | Result:
    """The first news of a search; raises `ProblemError` 503 if no searcher was free by then."""
    try:
        async with asyncio.timeout(deadline + GRACE_SECONDS):
            if first := await anext(news, None):
                return first
    except TimeoutError:
        pass
    detail = f"no searcher was free within the deadline of {deadline:g} s"
    raise ProblemError(503, detail, headers={"Retry-After": str(math.ceil(deadline))})


def _motion(made: Made, request: InterpolateRequest) -> Answer:
    form = {"columns": request.frames, "fps": request.fps, "scale": request.scale}
    return encode_motion(made, request.format, **form)


def _draw(request: BaseModel, seed: int | None) -> int:
    """The number by which a canary's share is drawn: the same for the same request."""
    return zlib.crc32(request.model_dump_json().encode()) if seed is None else seed


def too_busy(seconds: float = 0.0, many: bool = False) -> ProblemError:
    """What a client is told whose request finds no room; the gate is, that there are `many`."""
    headers = {"Retry-After": str(max(1, math.ceil(seconds)))}
    if many:
        headers[FULL] = "1"
    return ProblemError(503, "the endpoint has too much to do", headers=headers)


def _entry(
    model: Model, aliases: list[str], share: float, observed: Mapping[str, Observed]
) -> ModelEntry:
    card = model.card
    return ModelEntry(
        id=model.reference,
        created=int(datetime.fromisoformat(card.created).timestamp()),
        aliases=aliases,
        share=share,
        resolution=model.config.resolution,
        channels=model.config.channels,
        n_classes=len(model.config.class_names),
        observed=observed.get(model.reference, NOTHING_OBSERVED),
        **card.model_dump(include={"fid", "fid_protocol", "dataset", "run", "kimg", "licence"}),
    )


def _step(model: Model, progress: Progress) -> Step:
    [image] = _pngs(Made(model, [progress.recipe], progress.image[None]))
    return Step(step=progress.step, steps=progress.steps, psnr=progress.psnr, image=image)


def _pngs(made: Made) -> list[str]:
    """Each image as PNG in base64."""
    return [base64_text(content) for content in single_files(made, "png")]


def _found(model: Model, result: Result, seconds: float) -> FoundAnswer:
    found = result.inversion
    pngs = _pngs(Made(model, found.recipes, found.images))
    return FoundAnswer(
        model=model.reference,
        candidates=[
            Found(
                image=image,
                psnr=found.psnr[i],
                class_=model.config.class_names[next(iter(found.recipes[i].classes))],
                latent=recipes.told(found.recipes[i], model),
            )
            for i, image in enumerate(pngs)
        ],
        steps=result.steps,
        seconds=seconds,
        finished=result.finished,
    )


def _verdict(verdict: Verdict) -> VerifyAnswer:
    return VerifyAnswer(
        status=verdict.status,
        detail=verdict.sentence,
        model=verdict.origin.model if verdict.origin else None,
        description=describe(verdict.origin) if verdict.origin else None,
        largest_difference=verdict.largest,
        mean_difference=verdict.mean,
        synthetic=True if verdict.status == "verified" else None,
    )


def _size(request: ImagesRequest) -> tuple[int, int] | None:
    """Width and height asked for; None for the model's own. Raises `ProblemError`."""
    if request.size is None or request.size == "auto":
        return None
    width, height = map(int, request.size.split("x"))
    if max(width, height) > MAX_SIDE:
        recipes.refuse("size", request.size, f"sides are {MAX_SIDE} pixels at most")
    return width, height


def _images_response(
    made: Made, request: ImagesRequest, size: tuple[int, int] | None
) -> ImagesResponse:
    kind = request.output_format or "png"
    data = []
    for i, recipe in enumerate(made.recipes):
        origin = made.origin(slice(i, i + 1), size=size)
        text = base64_text(picture_file(lay_out(made.images[[i]], origin), kind, origin))
        name = made.model.config.class_names[next(iter(recipe.classes))]
        if request.response_format == "url":
            data.append(B64Image(url=f"data:image/{kind};base64,{text}", revised_prompt=name))
        else:
            data.append(B64Image(b64_json=text, revised_prompt=name))
    return ImagesResponse(created=int(time.time()), data=data)
