"""The teacher's images: those of the stock pipeline, each made once, and kept safely on disk."""

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image, ImageFile
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from rdm_rl import RDMTrainer
from rdm_rl.records import Rollout
from rdm_rl.rewards.images import ImageDecoder
from rdm_rl.rewards.teacher_images import TeacherCache, TeacherImages
from tests.helpers import QUICK, StepAway, batches_of, one_rollout, quick_trainer

# A rounding to 8 bits moves a value by at most this.
HALF_STEP = 0.5 / 255 + 1e-6


def noise_image(seed: int, size: int = 16) -> Tensor:
    """A picture that PNG cannot make smaller."""
    return torch.randint(256, (size, size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*.png"))


def leftovers(folder: Path) -> list[Path]:
    return sorted(folder.glob("**/*.partial"))


def size_of_one(folder: Path) -> int:
    """Bytes of a picture, at most."""
    cache = TeacherCache(folder / "one", "key")
    cache.put("a cat", 999, noise_image(0))
    return pictures(folder / "one")[0].stat().st_size + 2


@contextmanager
def running(code: str, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Another Python process, that ends with the block at the latest."""
    root = Path(__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


# ----- the cache -----


@pytest.mark.parametrize(
    "prompt", ["a cat", "", "two\nlines\r\n ", "ein Kätzchen, 猫", "half of a pair: \ud83d", "nul\0"]
)
@pytest.mark.parametrize("seed", [0, 2**63 + 1])
def test_a_hit_is_the_image_bit_for_bit(prompt: str, seed: int, tmp_path: Path) -> None:
    image = noise_image(3)
    TeacherCache(tmp_path, "key").put(prompt, seed, image)
    found = TeacherCache(tmp_path, "key").get(prompt, seed)
    assert found is not None
    assert found.dtype == torch.uint8
    assert torch.equal(found, image)


def test_other_prompt_seed_or_key_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path, "key")
    cache.put("a cat", 1, noise_image(1))
    assert cache.get("a cat", 1) is not None
    assert cache.get("a dog", 1) is None
    assert cache.get("a cat", 2) is None
    assert TeacherCache(tmp_path, "other").get("a cat", 1) is None
    assert not caplog.records, "a miss is nothing to warn of"


def test_prompts_and_seeds_are_not_run_together(tmp_path: Path) -> None:
    names = [("key", "a cat 1", 2), ("key", "a cat ", 12), ("keya", " cat 1", 2), ("key", "a cat", 12)]
    for number, (key, prompt, seed) in enumerate(names):
        TeacherCache(tmp_path, key).put(prompt, seed, noise_image(number))
    for number, (key, prompt, seed) in enumerate(names):
        assert torch.equal(TeacherCache(tmp_path, key).get(prompt, seed), noise_image(number))


def test_files_are_pictures_that_say_what_they_are(tmp_path: Path) -> None:
    TeacherCache(tmp_path, "key").put("a cat", 5, noise_image(1))
    (file,) = pictures(tmp_path)
    with Image.open(file) as picture:
        assert (picture.format, picture.mode, picture.size) == ("PNG", "RGB", (16, 16))
        assert (picture.text["prompt"], picture.text["noise_seed"], picture.text["teacher"]) == ("a cat", "5", "key")
        assert picture.getpixel((2, 1)) == tuple(noise_image(1)[1, 2].tolist())


@pytest.mark.parametrize("lenient", [False, True], ids=["strict", "LOAD_TRUNCATED_IMAGES"])
def test_a_damaged_file_is_never_a_picture(
    lenient: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", lenient)
    cache, image = TeacherCache(tmp_path, "key"), noise_image(1)
    cache.put("a cat", 1, image)
    (file,) = pictures(tmp_path)
    content = file.read_bytes()
    damages = [content[:length] for length in range(0, len(content) - 12, 7)]
    damages += [content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :] for at in range(0, len(content), 5)]
    misses = 0
    for damage in damages:
        file.write_bytes(damage)
        caplog.clear()
        found = cache.get("a cat", 1)
        if found is None:
            misses += 1
            assert [record.levelno for record in caplog.records] == [logging.WARNING]
            assert str(file) in caplog.text
        else:  # What was hit says nothing, as a checksum's own bytes where they are not looked at.
            assert torch.equal(found, image)
    assert misses > 0.9 * len(damages)
    cache.put("a cat", 1, image)
    assert torch.equal(cache.get("a cat", 1), image)


def test_a_file_under_another_name_is_a_miss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path, "key")
    cache.put("a cat", 1, noise_image(1))
    (cat,) = pictures(tmp_path)
    cache.put("a dog", 1, noise_image(2))
    (dog,) = set(pictures(tmp_path)) - {cat}
    dog.replace(cat)
    assert cache.get("a cat", 1) is None
    assert "is not the teacher image that its name says" in caplog.text


def test_a_picture_that_was_changed_is_a_miss(tmp_path: Path) -> None:
    """A person opened it and saved it again, with everything that was written beside it."""
    cache = TeacherCache(tmp_path, "key")
    cache.put("a cat", 1, noise_image(1))
    (file,) = pictures(tmp_path)
    with Image.open(file) as picture:
        text = PngInfo()
        for name, value in picture.text.items():
            text.add_text(name, value)
        picture.load()
        again = picture.copy()
    again.save(file, "PNG", pnginfo=text)
    assert cache.get("a cat", 1) is not None, "the same picture"
    again.putpixel((0, 0), (1, 2, 3))
    again.save(file, "PNG", pnginfo=text)
    assert cache.get("a cat", 1) is None


def test_what_cannot_be_written_is_not_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path, "key")
    cache.put("a cat", 1, noise_image(1))
    (file,) = pictures(tmp_path)
    file.unlink()
    (file / "in the way").mkdir(parents=True)
    for _ in range(3):
        cache.put("a cat", 1, noise_image(1))
    assert caplog.text.count("are not kept") == 1
    assert leftovers(tmp_path) == []
    assert cache.get("a cat", 1) is None
    cache.put("a cat", 2, noise_image(2))
    assert torch.equal(cache.get("a cat", 2), noise_image(2)), "others are"


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/self/fdinfo"])
def test_a_folder_that_cannot_be_written_to_is_refused_at_once(place: str, tmp_path: Path) -> None:
    if place.startswith("/proc") and not Path(place).is_dir():
        pytest.skip("A folder that even root cannot write to is only known on Linux.")
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError, match="Set teacher_cache_dir to a folder that this user may write to, or to None"):
        TeacherCache(tmp_path / place, "key")


# ----- several processes -----

# Writes one image after the other until it is killed.
ENDLESS_WRITER = """
import sys, torch
from rdm_rl.rewards.teacher_images import TeacherCache
cache = TeacherCache(sys.argv[1], "key")
for seed in range(100_000):
    generator = torch.Generator().manual_seed(seed)
    cache.put("a cat", seed, torch.randint(256, (512, 512, 3), dtype=torch.uint8, generator=generator))
"""

# Four processes that write and read at the same time, one image in the first folder and more than there is room for in
# the second; exit codes and warnings tell how it went.
FOUR_WRITERS = """
import os, sys, torch
from rdm_rl.rewards.teacher_images import TeacherCache
folders, size_limit = sys.argv[1:3], float(sys.argv[3])
images = [torch.full((16, 16, 3), number, dtype=torch.uint8) for number in range(4)]
for image in images:
    image[8:] = torch.randint(256, (8, 16, 3))
children = []
for own, folder in [(own, folder) for folder in folders for own in range(4)]:
    child, same = os.fork(), folder == folders[0]
    if not child:
        cache = TeacherCache(folder, "key", size_limit)
        for number in range(60):
            seed = 0 if same else 4 * number + own
            cache.put("a cat", seed, images[own])
            found = cache.get("a cat", seed)
            if found is None:
                right = not same  # Another process may have made room.
            else:
                right = any(torch.equal(found, image) for image in (images if same else [images[own]]))
            if not right:
                os._exit(3)
        os._exit(0)
    children.append(child)
print([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children])
"""


def test_a_killed_writer_does_no_harm(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with running(ENDLESS_WRITER, tmp_path) as writer:
        end = time.monotonic() + 300
        while True:
            assert time.monotonic() < end, "never seen in the middle of a file"
            assert writer.poll() is None, writer.communicate()
            # Once a picture is whole, stop the writer in the middle of the next one.
            if pictures(tmp_path) and leftovers(tmp_path):
                writer.send_signal(signal.SIGSTOP)
                assert os.WIFSTOPPED(os.waitpid(writer.pid, os.WUNTRACED)[1])
                halves = [file for file in leftovers(tmp_path) if file.stat().st_size]
                if halves and not halves[0].read_bytes().endswith(b"IEND\xaeB`\x82"):
                    break
                writer.send_signal(signal.SIGCONT)
            time.sleep(0.001)
        writer.kill()
        assert writer.wait() == -signal.SIGKILL
    (half,) = halves
    whole = pictures(tmp_path)
    assert half.exists()
    assert half.with_name(half.name.split(".png")[0] + ".png") not in whole

    cache = TeacherCache(tmp_path, "key")
    for seed in range(len(whole)):
        assert torch.equal(cache.get("a cat", seed), noise_image(seed, 512))
    assert cache.get("a cat", len(whole)) is None
    assert not caplog.records
    cache.put("a cat", len(whole), noise_image(1))
    assert torch.equal(cache.get("a cat", len(whole)), noise_image(1))

    assert leftovers(tmp_path) == [half], "a file of this hour may belong to a living writer"
    os.utime(half, (time.time() - 7200,) * 2)
    TeacherCache(tmp_path, "key")
    assert leftovers(tmp_path) == []
    assert len(pictures(tmp_path)) == len(whole) + 1


def test_four_processes_at_once(tmp_path: Path) -> None:
    limit = 20 * size_of_one(tmp_path / "sizes")
    one, full = tmp_path / "one image", tmp_path / "a full cache"
    with running(FOUR_WRITERS, one, full, limit) as process:
        output, errors = process.communicate(timeout=300)
    assert (output, errors) == (f"{[0] * 8}\n", "")
    assert leftovers(one) == leftovers(full) == []
    image = TeacherCache(one, "key").get("a cat", 0)
    assert image is not None
    assert len(image[:8].unique()) == 1
    assert image[0, 0, 0] < 4
    total = sum(file.stat().st_size for file in pictures(full))
    assert limit / 2 < total < limit * (1 + 4 / 10)
    TeacherCache(full, "key", limit)
    assert sum(file.stat().st_size for file in pictures(full)) <= limit


def test_threads_do_not_disturb_each_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache, image = TeacherCache(tmp_path, "key"), noise_image(1, 256)
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(cache.put, "a cat", 1, image) for _ in range(64)]:
            done.result()
    assert not caplog.records
    assert leftovers(tmp_path) == []
    assert torch.equal(cache.get("a cat", 1), image)


# ----- the size limit -----


def test_the_least_recently_used_goes_first(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", "key", 3.5 * size_of_one(tmp_path))
    for seed in range(3):
        cache.put("a cat", seed, noise_image(seed))
        (file,) = [one for one in pictures(cache.folder) if time.time() - one.stat().st_mtime < 1000]
        os.utime(file, (time.time() - 3000 + 100 * seed,) * 2)
    assert cache.get("a cat", 0) is not None, "the oldest has been used"
    cache.put("a cat", 3, noise_image(3))
    assert [seed for seed in range(4) if cache.get("a cat", seed) is not None] == [0, 2, 3]


def test_the_limit_holds_for_all_keys_together(tmp_path: Path) -> None:
    one = size_of_one(tmp_path)
    caches = [TeacherCache(tmp_path / "cache", key, 20 * one) for key in ("first", "second")]
    for seed in range(60):
        caches[seed // 30].put("a cat", seed, noise_image(seed))
        total = sum(file.stat().st_size for file in pictures(tmp_path / "cache"))
        assert total <= 20 * one
    assert total > 15 * one, "it is used"
    TeacherCache(tmp_path / "cache", "third", 5 * one)
    assert 3 * one < sum(file.stat().st_size for file in pictures(tmp_path / "cache")) <= 5 * one
    assert caches[1].get("a cat", 59) is not None, "the newest stays"


def test_the_newest_stays_if_the_limit_allows_for_one(tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", "key", 1.05 * size_of_one(tmp_path))
    for seed in range(3):
        cache.put("a cat", seed, noise_image(seed))
        assert torch.equal(cache.get("a cat", seed), noise_image(seed))
        assert len(pictures(cache.folder)) == 1


def test_the_folder_is_not_searched_at_every_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches, search = [], Path.glob
    one = size_of_one(tmp_path)
    for limit in (None, 64 * one):
        cache = TeacherCache(tmp_path / f"cache {limit}", "key", limit)
        with monkeypatch.context() as patch:
            patch.setattr(Path, "glob", lambda *given: searches.append(given) or search(*given))
            for seed in range(128):
                cache.put("a cat", seed, noise_image(seed))
        # Twice after each tenth of the limit, that is six images, and whenever it is passed.
        assert len(searches) == 0 if limit is None else 20 < len(searches) < 60
    assert len(pictures(tmp_path / "cache None")) == 128


def test_only_own_files_are_ever_removed(tmp_path: Path) -> None:
    one = size_of_one(tmp_path)
    folder = tmp_path / "cache"
    others = [
        folder / name
        for name in ("me.png", "ab/me.png", "ab/teacher-image-1.jpg", "ab/me.png.1.partial", "teacher-image-1.png")
    ]
    for other in others:
        other.parent.mkdir(parents=True, exist_ok=True)
        other.write_bytes(b"x" * 10 * one)
        os.utime(other, (0, 0))
    cache = TeacherCache(folder, "key", 2.5 * one)
    for seed in range(6):
        cache.put("a cat", seed, noise_image(seed))
    assert all(other.exists() for other in others)
    assert sum(cache.get("a cat", seed) is not None for seed in range(6)) == 2


# ----- the images of a rollout -----


@pytest.fixture
def trainer(base: Path, tmp_path: Path) -> RDMTrainer:
    """Of batches of four samples, a teacher that heeds its prompts, and a student that is another model."""
    settings = {"teacher_guidance_scale": 10.0, "teacher_num_inference_steps": 2}
    made = quick_trainer(base, tmp_path / "run", StepAway(), **QUICK, **settings)
    for parameter in made.networks.parameters("policy"):
        parameter.data += 0.1
    return made


def teacher_images(trainer: RDMTrainer, cache: TeacherCache | None = None, decode_batch_size: int = 3) -> TeacherImages:
    return TeacherImages(
        trainer.networks.predictor("teacher", trainer.teacher_guidance_scale),
        trainer.family.schedule,
        ImageDecoder(trainer.family.decode, decode_batch_size),
        trainer.args.teacher_num_inference_steps,
        cache,
    )


def seeded_rollout(trainer: RDMTrainer, prompts: list[str], seeds: list[int] | None) -> Rollout:
    batch = next(trainer.prompt_batches(0))
    conditioning = trainer.family.encode(prompts)
    return trainer.generate_rollout(replace(batch, prompts=prompts, conditioning=conditioning, noise_seeds=seeds))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_images_are_those_of_the_stock_pipeline(guidance: float, base: Path, tmp_path: Path) -> None:
    """DDIM over 999, 749, 499, 249 and on to 0, from the noise that the student starts from."""
    settings = {"teacher_guidance_scale": guidance, "teacher_num_inference_steps": 4}
    trainer = quick_trainer(base, tmp_path, StepAway(), **QUICK, **settings)
    for parameter in trainer.networks.parameters("policy"):
        parameter.data += 0.1
    rollout = one_rollout(trainer)
    give = teacher_images(trainer)
    images = give(rollout)

    stock = StableDiffusionPipeline.from_pretrained(str(base))
    stock.set_progress_bar_config(disable=True)
    stock.scheduler = DDIMScheduler.from_config(
        stock.scheduler.config, timestep_spacing="trailing", steps_offset=0, set_alpha_to_one=True, clip_sample=False
    )
    expected = stock(
        list(rollout.batch.prompts),
        latents=rollout.states[0],
        num_inference_steps=4,
        guidance_scale=guidance,
        output_type="pt",
    ).images
    assert stock.scheduler.timesteps.tolist() == [999, 749, 499, 249]
    torch.testing.assert_close(images, expected, rtol=0, atol=HALF_STEP + 1e-4)
    assert (images - trainer.family.decode(rollout.sample)).abs().max() > 0.01
    with batches_of(trainer.networks.module("teacher")) as sizes:
        assert give(rollout) is images, "kept for the next reward"
        give(trainer.generate_rollout(next(trainer.prompt_batches(1))))
    assert len(sizes) == 1 + 4, "the student's step and the teacher's four"


def test_images_have_8_bits_with_a_cache_and_without(trainer: RDMTrainer, tmp_path: Path) -> None:
    rollout = seeded_rollout(trainer, ["a", "b", "c", "d"], [1, 2, 3, 4])
    plain, kept = (teacher_images(trainer, cache)(rollout) for cache in (None, TeacherCache(tmp_path / "cache", "key")))
    assert torch.equal(plain, kept)
    assert plain.dtype == torch.float32
    assert torch.equal(plain, (plain * 255).round() / 255)
    assert plain.unique().numel() > 20


@pytest.mark.parametrize("cached", [False, True])
def test_equal_rows_are_computed_once(cached: bool, trainer: RDMTrainer, tmp_path: Path) -> None:
    rollout = seeded_rollout(trainer, ["a", "a", "b", "b"], [5, 5, 6, 5])
    assert torch.equal(rollout.states[0, 0], rollout.states[0, 3]), "a seed names a noise"
    give = teacher_images(trainer, TeacherCache(tmp_path / "cache", "key") if cached else None, decode_batch_size=2)
    with (
        batches_of(trainer.networks.module("teacher")) as solved,
        batches_of(trainer.family.pipeline.vae.decoder) as decoded,
    ):
        images = give(rollout)
    # Two steps of three samples, each asked with its prompt and without.
    assert (solved, decoded, give.computed) == ([6, 6], [2, 1], 3)
    assert torch.equal(images[0], images[1])
    one_by_one = teacher_images(trainer)
    expected = one_by_one(replace(rollout, batch=replace(rollout.batch, noise_seeds=None)))
    assert one_by_one.computed == 4
    torch.testing.assert_close(images, expected, rtol=0, atol=2 * HALF_STEP)
    apart = [(images[one] - images[other]).abs().max() for one, other in ((0, 2), (0, 3), (2, 3))]
    assert min(apart) > 4 / 255
    assert len(pictures(tmp_path / "cache")) == (3 if cached else 0)


def test_other_noise_makes_another_image(trainer: RDMTrainer, tmp_path: Path) -> None:
    give = teacher_images(trainer, TeacherCache(tmp_path / "cache", "key"))
    images = give(seeded_rollout(trainer, ["the digit 3"] * 4, [0, 1, 2, 0]))
    assert torch.equal(images[0], images[3])
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert (images[one] - images[other]).abs().max() > 4 / 255
    assert give.computed == 3


def test_only_what_is_missing_is_computed(trainer: RDMTrainer, tmp_path: Path) -> None:
    def cache() -> TeacherCache:
        return TeacherCache(tmp_path / "cache", "key")

    first = teacher_images(trainer, cache())
    made = first(seeded_rollout(trainer, ["a", "b", "c", "d"], [1, 2, 3, 4]))
    again = teacher_images(trainer, cache())
    with batches_of(trainer.networks.module("teacher")) as solved:
        found = again(seeded_rollout(trainer, ["d", "a", "c", "b"], [4, 1, 3, 2]))
    assert len(solved) == 1, "the student's step"
    assert torch.equal(found, made[[3, 0, 2, 1]])

    rollout = seeded_rollout(trainer, ["x", "d", "a", "y"], [1, 4, 4, 2])
    mixed, expected = again(rollout), teacher_images(trainer)(rollout)
    assert (first.computed, again.computed) == (4, 3)
    assert torch.equal(mixed[1], made[3])
    # A value near the middle of two may be rounded to the other one.
    torch.testing.assert_close(mixed, expected, rtol=0, atol=2 * HALF_STEP)
    assert min((expected[one] - expected[other]).abs().max() for one in range(4) for other in range(one)) > 4 / 255


def test_another_key_computes_anew(trainer: RDMTrainer, tmp_path: Path) -> None:
    rollout = seeded_rollout(trainer, ["a", "b", "c", "d"], [1, 2, 3, 4])
    for key, computed in (("one", 4), ("other", 4), ("one", 0)):
        give = teacher_images(trainer, TeacherCache(tmp_path / "cache", key))
        give(rollout)
        assert give.computed == computed


def test_a_damaged_file_is_made_again(trainer: RDMTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = TeacherCache(tmp_path / "cache", "key")
    rollout = seeded_rollout(trainer, ["a", "b", "c", "d"], [1, 2, 3, 4])
    made = teacher_images(trainer, cache)(rollout)
    file = pictures(tmp_path / "cache")[2]
    file.write_bytes(file.read_bytes()[:-30])
    for computed in (1, 0):
        give = teacher_images(trainer, cache)
        torch.testing.assert_close(give(rollout), made, rtol=0, atol=2 * HALF_STEP)
        assert give.computed == computed
    assert len(caplog.records) == 1


def test_without_seeds_nothing_is_written_or_shared(trainer: RDMTrainer, tmp_path: Path) -> None:
    give = teacher_images(trainer, TeacherCache(tmp_path / "cache", "key"))
    images = give(seeded_rollout(trainer, ["a"] * 4, None))
    assert give.computed == 4
    assert min((images[one] - images[other]).abs().max() for one in range(4) for other in range(one)) > 4 / 255
    assert pictures(tmp_path / "cache") == []


def test_an_image_that_is_not_finite_stops_the_run(trainer: RDMTrainer, tmp_path: Path) -> None:
    cache = TeacherCache(tmp_path / "cache", "key")
    give = teacher_images(trainer, cache)
    give.decoder = ImageDecoder(lambda x_0: trainer.family.decode(x_0) * torch.nan, 3)
    with pytest.raises(ValueError, match="not finite"):
        give(seeded_rollout(trainer, ["a", "b", "c", "d"], [1, 2, 3, 4]))
    assert pictures(tmp_path / "cache") == []
