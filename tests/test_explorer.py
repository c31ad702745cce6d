"""探索器：浏览器里算的与 torch 的一样，画的脸与 Python 的一样；页面轻、不向外面要东西；真的浏览器里转得动。

算的那一半要一个 JavaScript 引擎：node，或 PyPI 的 mini-racer；都没有就跳过。浏览器的那一半要 chromium 与 playwright。
"""

import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import explorer
import numpy as np
import pytest
import torch
from browsing import launched, served
from PIL import Image
from sanitizer import sanitized, shows_a_still_picture

from vaelab import plot
from vaelab.faces import FACE_FACTORS, draw_faces
from vaelab.images import to_float, to_uint8

SCRIPTS = ("faces.js", "network.js")
FIRST = ("index.html", "style.css", "faces.js", "network.js", "explorer.js", "manifest.json", "frames.webp", "samples.webp")


# ---------------------------------------------------------------- 与 torch、Python 相比


def javascript(body: str, given: dict) -> object:
    """在 node 或 mini-racer 里运行网页的两个脚本，再运行 ``body``：它用 ``given``，返回一个 JSON 装得下的东西。

    ``given`` 里另有 manifest 与两个权重文件的字节。
    """
    manifest = json.loads((explorer.DATA / "manifest.json").read_text(encoding="utf-8"))
    given = {**given, "manifest": manifest, "files": {name: list((explorer.DATA / name).read_bytes()) for name in explorer.PARTS}}
    source = "\n".join((explorer.PAGE / name).read_text(encoding="utf-8") for name in SCRIPTS)
    source += f"""
    function loaded(given) {{
      const network = new Network(given.manifest.model);
      for (const [file, bytes] of Object.entries(given.files)) {{
        network.add(readTensors(Uint8Array.from(bytes).buffer, given.manifest.tensors[file]));
      }}
      return network;
    }}
    function main(given) {{ {body} }}
    """
    if node := shutil.which("node"):
        source += 'process.stdout.write(JSON.stringify(main(JSON.parse(require("fs").readFileSync(0, "utf8")))));'
        done = subprocess.run([node, "-e", source], input=json.dumps(given), capture_output=True, text=True, encoding="utf-8")
        assert not done.returncode, done.stderr
        return json.loads(done.stdout)
    if importlib.util.find_spec("py_mini_racer"):
        from py_mini_racer import MiniRacer

        engine = MiniRacer()
        engine.eval(source)
        return json.loads(engine.eval(f"JSON.stringify(main({json.dumps(given)}))"))
    pytest.skip("没有 node，也没有装 mini-racer（pip install mini-racer），JavaScript 的一半没有测")


@pytest.fixture(scope="module")
def trained():
    return explorer.load()


def test_the_decoder_in_javascript_agrees_with_torch(trained):
    """随机的、极端的 z，与仓库里的帧：画面至多差一个灰阶，而且几乎处处相同。"""
    model, prior, manifest = trained
    generator = torch.Generator().manual_seed(0)
    z = torch.cat(
        [
            torch.randn(16, model.latent_dim, generator=generator),
            prior.sample(4, generator).float(),
            torch.zeros(1, model.latent_dim),
            torch.full((1, model.latent_dim), 3.0),
            torch.full((1, model.latent_dim), -8.0),
            20 * torch.randn(4, model.latent_dim, generator=generator),
            1000 * torch.eye(model.latent_dim)[:2],
        ]
    )
    body = (
        "const network = loaded(given); return given.z.map((z) => { const x = network.decode(z); return [Array.from(x), Array.from(toPixels(x))]; });"
    )
    came = javascript(body, {"z": z.tolist()})
    with torch.no_grad():
        expected = model.decode(z)
    floats = torch.tensor([x for x, _ in came]).view_as(expected)
    pixels = torch.tensor([p for _, p in came]).view_as(expected)
    assert (floats - expected)[:21].abs().max() < 1e-4
    difference = (pixels - to_uint8(expected).int()).abs()
    assert difference.max() <= 1 and (difference > 0).float().mean() < 0.001
    assert pixels.float().std() > 20 and len(set(map(tuple, pixels.flatten(1).tolist()))) == len(z)


def test_the_encoder_in_javascript_agrees_with_torch(trained):
    model, _, _ = trained
    factors = torch.rand(16, len(FACE_FACTORS), generator=torch.Generator().manual_seed(1))
    images = torch.cat([draw_faces(factors), torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)])
    came = javascript("const network = loaded(given); return given.x.map((x) => Array.from(network.encode(x)));", {"x": images.flatten(1).tolist()})
    with torch.no_grad():
        mu = model.encode(to_float(images))[0]
    assert (torch.tensor(came) - mu).abs().max() < 1e-4 and mu.std() > 0.3


def test_the_face_formula_in_javascript_draws_the_same_bytes():
    """随机的因子、两头与正中：逐字节相同，不止是差不到一个灰阶。"""
    generator = torch.Generator().manual_seed(3)
    factors = torch.cat([torch.rand(40, 12, generator=generator), torch.randint(2, (10, 12), generator=generator).float(), torch.full((1, 12), 0.5)])
    for size in (64, 32):
        came = javascript("return given.factors.map((each) => Array.from(drawFace(each, given.size)));", {"factors": factors.tolist(), "size": size})
        assert torch.equal(torch.tensor(came, dtype=torch.uint8).view(-1, 3, size, size), draw_faces(factors, size))


def test_half_precision_is_read_exactly():
    """float16 的每一种有限的值。"""
    bits = np.arange(65536, dtype="<u2")
    values = bits.view("<f2").astype(float)
    finite = np.isfinite(values)
    came = javascript("return given.bits.map(fromHalf);", {"bits": bits[finite].tolist()})
    assert np.array_equal(np.array(came, dtype=float), values[finite])


# ---------------------------------------------------------------- 数据


def test_the_frames_are_what_the_decoder_draws(trained):
    """WebP 有损：每一帧平均差不到 8 个灰阶（量到的最大是 6.0），而且离自己的那一张比离别的行、别的列的都近。"""
    model, _, manifest = trained
    columns = len(manifest["positions"])
    for file, z in (("frames.webp", explorer.frame_codes(manifest)), ("samples.webp", explorer.sample_codes(manifest))):
        sheet = torch.from_numpy(np.array(Image.open(explorer.DATA / file).convert("RGB")))
        tiles = sheet.unfold(0, 64, 64).unfold(1, 64, 64).flatten(0, 1)[: len(z)].float()  # [N, 3, 64, 64]
        drawn = explorer.decode(model, z).float()
        assert (tiles - drawn).abs().flatten(1).mean(1).max() < 8, file
        if file == "frames.webp":
            used = sum(knob["kld"] >= 0.1 for knob in manifest["knobs"]) * columns
            apart = torch.cdist(tiles[:used].flatten(1), drawn[:used].flatten(1))
            ends = [row + column for row in range(0, used, columns) for column in (0, columns - 1)]  # 两头的帧最不一样
            assert (apart[ends].argmin(1) == torch.tensor(ends)).all()


def test_the_manifest_tells_the_truth_about_the_model(trained):
    model, prior, manifest = trained
    assert [each["name"] for each in manifest["factors"]] == list(FACE_FACTORS) and len({each["label"] for each in manifest["factors"]}) == 12
    assert sorted(knob["latent"] for knob in manifest["knobs"]) == list(range(model.latent_dim))
    klds = [knob["kld"] for knob in manifest["knobs"]]
    assert klds == sorted(klds, reverse=True) and abs(sum(klds) - manifest["test"]["kld"]) < 0.2
    assert manifest["test"]["active"] == sum(knob["active"] for knob in manifest["knobs"])
    start = torch.tensor([manifest["start"]["factors"]] + [face["factors"] for face in manifest["faces"]])
    with torch.no_grad():
        mu = model.encode(to_float(draw_faces(start)))[0]
    stored = torch.tensor([manifest["start"]["z"]] + [face["z"] for face in manifest["faces"]])
    assert (mu - stored).abs().max() < 0.02  # 因子存到万分位
    assert manifest["distance"]["fitted"] < manifest["distance"]["prior"] and manifest["midway"]["latent"] < manifest["midway"]["pixels"]
    assert prior.weights.sum() == pytest.approx(1)


def test_shares_of_variance_are_measured_right():
    """mu 的一维只随一个因子变：几成是 1；绕一圈的也量得出；与谁都无关的接近 0。"""
    factors = torch.rand(9000, 12, generator=torch.Generator().manual_seed(4))
    noise = torch.randn(9000, generator=torch.Generator().manual_seed(5))
    mu = torch.stack([factors[:, 2], torch.cos(2 * torch.pi * factors[:, 1]), noise, factors[:, 4] - 0.5 + noise / 12**0.5, 0.01 * noise], dim=1)
    rows = explorer.knobs(mu, factors, torch.tensor([3.0, 5.0, 2.0, 1.0, 0.0]))
    assert [row["latent"] for row in rows] == [1, 0, 2, 3, 4] and [row["active"] for row in rows] == [True] * 4 + [False]
    assert rows[0]["factor"] == "hair_hue" and rows[0]["share"] > 0.98 and rows[1]["factor"] == "hair_length" and rows[1]["share"] > 0.98
    assert rows[2]["share"] < 0.01 and rows[3]["factor"] == "eye_gap" and rows[3]["share"] == pytest.approx(0.5, abs=0.03)


# ---------------------------------------------------------------- 页面


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    return explorer.assemble(tmp_path_factory.mktemp("探索器") / "explorer").parent


def test_the_first_load_is_light(site):
    assert sum((site / name).stat().st_size for name in FIRST) < 300_000
    assert (site / "weights.bin").stat().st_size <= 300_000
    assert explorer.PICTURE.stat().st_size <= 300_000


def test_nothing_comes_from_elsewhere(site):
    """每个 src、href、url()、import、fetch 都在这个文件夹里，而且在。"""
    for path in [each for each in site.iterdir() if each.suffix in (".html", ".css", ".js")]:
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"https?:|[\"'(]//|@import|importScripts|XMLHttpRequest|WebSocket|sendBeacon", text), path.name
        for target in re.findall(r"""(?:src|href)="([^"]*)"|url\(([^)]*)\)""", text):
            target = "".join(target)
            assert target.startswith(("#", "data:")) or (site / target).is_file(), target


def test_without_javascript_there_is_a_picture_and_a_sentence(site):
    inside = re.search(r"<noscript>(.*?)</noscript>", (site / "index.html").read_text(encoding="utf-8"), re.DOTALL)[1]
    (picture,), words = sanitized(inside)
    assert (site / picture["src"]).is_file() and len(picture["alt"]) > 10 and "JavaScript" in words


def luminance(color: str) -> float:
    linear = [
        value / 12.92 if value <= 0.03928 else ((value + 0.055) / 1.055) ** 2.4 for value in (int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_every_text_color_stands_out():
    """明暗两色里，文字的每一种颜色与纸、与卡片的对比都在 4.5 以上（WCAG AA）。"""
    blocks = re.findall(r":root \{(.*?)\}", (explorer.PAGE / "style.css").read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        colors = dict(re.findall(r"--([a-z]+): (#[0-9a-f]{6});", block))
        for text in ("ink", "soft", "true", "learned"):
            for ground in ("paper", "card"):
                light, dark = sorted((luminance(colors[text]), luminance(colors[ground])), reverse=True)
                assert (light + 0.05) / (dark + 0.05) >= 4.5, (text, ground)


# ---------------------------------------------------------------- 笔记里的滑块


def test_the_slider_leaves_a_still_picture_after_sanitizing(trained):
    strip = (explorer.DATA / "frames.webp").read_bytes()
    page = plot.slider(strip, ["1 <b>&", "2"], trained[2]["positions"], '一行一个"旋钮"')
    assert page == plot.slider(strip, ["1 <b>&", "2"], trained[2]["positions"], '一行一个"旋钮"') and len(page) < 150_000
    (picture,), words = sanitized(page)
    assert picture["alt"] == '一行一个"旋钮"' and picture["src"].startswith("data:image/webp;base64,") and not words
    assert shows_a_still_picture(page)
    for broken in (page.replace("alt=", "data-alt="), page.replace("<img ", "<svg "), page.replace("<script>", '<script src="https://x.org/a.js">')):
        assert not shows_a_still_picture(broken)
    with pytest.raises(ValueError, match="WebP"):
        plot.slider(b"GIF89a", ["1"], [0.0], "图")
    with pytest.raises(ValueError, match="alt"):
        plot.slider(strip, ["1"], [0.0], " ")


# ---------------------------------------------------------------- 真的浏览器


@pytest.fixture(scope="module")
def address(site):
    with served(site) as root:
        yield f"{root}index.html"


@pytest.fixture(scope="module")
def browser():
    with launched() as opened:
        yield opened


@pytest.fixture
def visit(browser):
    """打开一页，等它就绪；离开时核对没有控制台错误，也没有向别处要东西。"""
    opened, troubles = [], []

    def go(url: str, ready: str = "main:not([hidden])", forgive: str = "$^", **options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        page = context.new_page()
        page.on("console", lambda message: message.type == "error" and not re.search(forgive, message.text) and troubles.append(message.text))
        page.on("pageerror", lambda error: troubles.append(str(error)))
        page.on("request", lambda request: re.match(r"https?://(?!127\.0\.0\.1)", request.url) and troubles.append(request.url))
        if forgive != "$^":
            page.route(re.compile(forgive), lambda route: route.abort())
        opened.append(context)
        page.goto(url)
        page.wait_for_selector(ready)
        return page

    yield go
    for context in opened:
        context.close()
    assert not troubles


def pixels(page, selector: str) -> list:
    return page.evaluate(f"Array.from(document.querySelector('{selector}').getContext('2d').getImageData(0, 0, 64, 64).data)")


def settle(page) -> None:
    """等到排着队的重画画完。"""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def test_dragging_turns_both_faces(visit, address, trained):
    """拖一个真的旋钮：左边的脸照公式变，右边的脸是它的重建，学到的旋钮跟着转。"""
    page = visit(address)
    left, right = pixels(page, "#real-face"), pixels(page, "#vae-face")
    factors = trained[2]["start"]["factors"]
    assert left == torch.cat([draw_faces(torch.tensor([factors]))[0], torch.full((1, 64, 64), 255)]).permute(1, 2, 0).flatten().tolist()
    knob = page.locator("#real .face").nth(1)
    box = knob.bounding_box()
    page.mouse.move(box["x"] + 30, box["y"] + 30)
    page.mouse.down()
    page.mouse.move(box["x"] + 110, box["y"] + 30, steps=4)
    page.mouse.up()
    page.wait_for_function("arrived.size === 2")
    settle(page)
    assert float(knob.get_attribute("aria-valuenow")) == pytest.approx(factors[1] + 0.5, abs=0.02)
    assert pixels(page, "#real-face") != left and pixels(page, "#vae-face") != right
    z = torch.tensor([list(page.evaluate("Array.from(z)"))])
    seen = torch.tensor(pixels(page, "#vae-face"), dtype=torch.uint8).view(64, 64, 4).permute(2, 0, 1)[:3]
    assert (seen.int() - explorer.decode(trained[0], z)[0].int()).abs().max() <= 1
    assert (z - torch.tensor(trained[2]["start"]["z"])).abs().max() > 0.3
    assert "发色" in page.locator("#real-face").get_attribute("aria-label")


def test_the_keyboard_is_enough(visit, address):
    page = visit(address)
    knob = page.locator("#learned .face").first
    knob.focus()
    before = float(knob.get_attribute("aria-valuenow"))
    face = pixels(page, "#vae-face")
    values = []
    for key in ("ArrowRight", "ArrowLeft", "ArrowLeft", "PageUp", "Home", "End"):
        page.keyboard.press(key)
        settle(page)
        values.append(float(knob.get_attribute("aria-valuenow")) - before)
    assert values[:4] == pytest.approx([0.2, 0, -0.2, 0.8], abs=0.02) and values[4:] == pytest.approx([-3 - before, 3 - before], abs=0.02)
    assert pixels(page, "#vae-face") != face
    assert knob.evaluate("each => getComputedStyle(each).outlineStyle") == "solid"  # 焦点看得见
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('role')") == "slider"
    order = page.evaluate("[...document.querySelectorAll('a[href], button, input, [tabindex]')].map((each) => each.tabIndex)")
    assert set(order) == {0}  # Tab 的次序就是页面的次序


def test_samples_and_the_walk(visit, address, trained):
    model, _, manifest = trained
    page = visit(address)
    assert len({tuple(pixels(page, f"#{name} button:nth-child({i}) canvas")) for name in ("prior", "fitted") for i in range(1, 17)}) == 32
    first = pixels(page, "#fitted canvas")
    page.click("#again")
    page.wait_for_selector("#again:disabled")
    page.wait_for_selector("#again:enabled")
    assert pixels(page, "#fitted canvas") != first
    page.click("#prior button")
    settle(page)
    assert page.evaluate("Array.from(z).every((value, i) => Math.abs(value - manifest.samples.prior[0][i]) < 1e-5)")
    middle = pixels(page, "#straight")
    page.locator("#t").focus()
    page.keyboard.press("Home")
    settle(page)
    assert pixels(page, "#straight") != middle and page.locator("#where").inner_text() == "0%"
    assert pixels(page, "#blend") == pixels(page, "#from canvas")
    for key, face in (("Home", 0), ("End", 1)):  # 两头就是两张脸的重建
        page.keyboard.press(key)
        settle(page)
        expected = explorer.decode(model, torch.tensor([manifest["faces"][face]["z"]]))[0].int()
        seen = torch.tensor(pixels(page, "#straight")).view(64, 64, 4).permute(2, 0, 1)[:3]
        assert (seen - expected).abs().max() <= 1
    page.click("#to")
    page.click("#play")
    page.wait_for_timeout(400)
    assert page.locator("#play").inner_text() == "停下" and float(page.locator("#t").input_value()) > 0


def test_without_weights_the_frames_still_turn(visit, address):
    """权重取不到：一句中文，帧照用。"""
    page = visit(address, forgive=r"weights\.bin|ERR_FAILED")
    knob = page.locator("#learned .face").first
    face = pixels(page, "#vae-face")
    knob.focus()
    page.keyboard.press("End")
    page.wait_for_function("document.querySelector('#status').textContent.includes('没有取到')")
    settle(page)
    right = pixels(page, "#vae-face")
    page.keyboard.press("Home")
    settle(page)
    assert len({tuple(each) for each in (face, right, pixels(page, "#vae-face"))}) == 3


def test_a_double_click_on_the_file_is_enough(visit, site):
    page = visit((site / "index.html").as_uri())
    page.locator("#learned .face").first.focus()
    page.keyboard.press("ArrowRight")
    page.wait_for_function("arrived.size === 1")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_everything(visit, address, scheme):
    """360 像素宽：不横着溢出，碰得到的都不小于 44 像素，手指横着划得动。"""
    page = visit(address, viewport={"width": 360, "height": 740}, color_scheme=scheme, has_touch=True, is_mobile=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    beyond = "[...document.querySelectorAll('main *, header *')].filter((each) => each.getBoundingClientRect().right > 360.5)"
    assert page.evaluate(f"{beyond}.length") == 0
    small = "[...document.querySelectorAll('button, input, [role=slider]')].map((each) => each.getBoundingClientRect())"
    assert page.evaluate(f"Math.min(...{small}.flatMap((box) => [box.width, box.height]))") >= 44
    knob = page.locator("#learned .face").nth(1)
    knob.scroll_into_view_if_needed()
    box, before = knob.bounding_box(), float(knob.get_attribute("aria-valuenow"))
    finger = page.context.new_cdp_session(page)
    for kind, x in (("touchStart", 30), ("touchMove", 45), ("touchMove", 60), ("touchMove", 90), ("touchEnd", None)):
        points = [] if x is None else [{"x": box["x"] + x, "y": box["y"] + 30}]
        finger.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(page)
    assert float(knob.get_attribute("aria-valuenow")) > before + 0.5
    screens = page.locator(".screens").bounding_box()
    assert 0 <= screens["y"] and screens["y"] + screens["height"] < 740  # 转旋钮时两张脸都看得见
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")


def test_a_reader_without_javascript_sees_the_still(visit, address):
    page = visit(address, ready="img", java_script_enabled=False)
    assert page.locator("img").is_visible() and not page.locator("main").is_visible()


def test_the_slider_of_the_notebook_turns(visit, tmp_path, trained):
    manifest = trained[2]
    labels = [f"旋钮 {row + 1}" for row in range(len(manifest["knobs"]))]
    body = plot.slider((explorer.DATA / "frames.webp").read_bytes(), labels, manifest["positions"], "一行一个旋钮")
    path = tmp_path / "cell.html"
    path.write_text(f'<!doctype html><meta charset="utf-8">{body}{body}', encoding="utf-8")  # 一页里有两个也各转各的
    page = visit(path.as_uri(), ready="input", viewport={"width": 360, "height": 740})
    assert page.locator("input").count() == 2 * len(labels) and not page.locator("img").first.is_visible()
    first = page.locator("input").first
    first.focus()
    page.keyboard.press("ArrowRight")
    assert first.get_attribute("aria-valuetext") == str(manifest["positions"][7]) and first.get_attribute("aria-label") == "旋钮 1"
    places = page.evaluate("[...document.querySelectorAll('[role=img]')].slice(0, 2).map((each) => each.style.backgroundPosition)")
    assert places == ["-672px 0px", "-576px -96px"]
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
