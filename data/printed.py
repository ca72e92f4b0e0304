"""Printed digits in the fonts of matplotlib, bent and on eight colours: base/miniature learns them.

y = even, odd; a = the colour of the background. More captions tell the digit or the colour alone.
"""

from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from common import stage
from data import Found, split_of

np = stage.lazy("numpy")

SOURCE = None  # nothing to download
SIZE, GLYPH = 32, 96  # pixels of an image, and of the canvas that a glyph is drawn on
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {"red": (200, 50, 45), "green": (50, 160, 65), "blue": (50, 80, 200),
           "yellow": (205, 185, 45), "purple": (140, 55, 170), "cyan": (40, 170, 180),
           "orange": (225, 125, 35), "grey": (120, 120, 120)}


def add_flags(parser):
    parser.add_argument("--images", type=stage.number(int, 1), default=40_000,
                        help="images to draw")
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws")


def words(args):
    return ("a photo of an {y} digit on a {a} background", "a photo of an {y} digit",
            ("even", "odd"), tuple(COLOURS))


def read(args):
    rng = np.random.default_rng(args.seed)
    colours, rows = rng.integers(len(COLOURS), size=args.images), []
    for index, a in enumerate(colours.tolist()):
        digit = index % len(DIGITS)
        name = f"a photo of the digit {DIGITS[digit]}"
        colour = f"on a {list(COLOURS)[a]} background"
        rows.append({"file_name": f"{index:05}.png", "y": digit % 2, "a": a, "digit": digit,
                     "split": split_of(index / args.images, 0.95, 1),
                     "digit_text": f"{name} {colour}", "digit_class_text": name,
                     "colour_text": f"a photo of a digit {colour}"})

    def write(folder):
        fonts = [ImageFont.truetype(str(path), 48) for path in digit_fonts()]
        for row in rows:
            glyph = draw(str(row["digit"]), fonts[rng.integers(len(fonts))], rng)
            mean = np.array(list(COLOURS.values())[row["a"]])
            ink, ground = bent(glyph, rng)[..., None], mean + rng.integers(-25, 26, size=3)
            image = ((1 - ink) * ground + ink * 245).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / row["file_name"])

    return Found(write, rows)


def digit_fonts():
    """matplotlib's fonts that draw ten upright digits on the line (others: blanks, symbols)."""
    import matplotlib
    from matplotlib.ft2font import FT2Font

    symbols = ("LastResort", "STIXSiz", "STIXNonUni", "cmex", "cmsy", "cmmi")
    paths = sorted(Path(matplotlib.get_data_path(), "fonts/ttf").glob("*.ttf"))
    return [path for path in paths
            if not path.name.startswith(symbols) and "Display" not in path.name
            and {*map(ord, "0123456789")} <= FT2Font(str(path)).get_charmap().keys()]


def draw(digit, font, rng):
    """A digit on a canvas of its own, with strokes of the font's width or wider: grey image."""
    glyph = Image.new("L", (GLYPH, GLYPH))
    ImageDraw.Draw(glyph).text((GLYPH / 2, GLYPH / 2), digit, 255, font, anchor="mm",
                               stroke_width=int(rng.integers(3)))
    return glyph


def bent(glyph, rng):
    """Turns, slants, scales and bends a glyph: its ink in SIZE x SIZE pixels, from 0 to 1."""
    from scipy import ndimage

    angle, slant = np.deg2rad(rng.uniform(-12, 12)), rng.uniform(-0.35, 0.35)
    wide, high = rng.uniform(1.2, 1.9), rng.uniform(1.4, 1.9)  # of the glyph's pixels per pixel
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[high, 0], [slant * wide, wide]])
    grid = np.stack(np.mgrid[:SIZE, :SIZE]) - (SIZE - 1) / 2
    places = np.tensordot(matrix, grid + rng.uniform(-1.5, 1.5, size=(2, 1, 1)), 1) + GLYPH / 2
    bends = rng.normal(0, rng.uniform(0, 3.5), size=(2, 4, 4))  # pixels, at 4 x 4 places
    places += ndimage.zoom(bends, (1, SIZE / 4, SIZE / 4), order=3)
    smooth = ndimage.gaussian_filter(np.asarray(glyph, float) / 255, 0.6)
    return ndimage.map_coordinates(smooth, places, order=1).clip(0, 1)
