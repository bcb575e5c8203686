"""Folder names that are no identities: splits, sets, cameras, times, places, and those of public sets."""

import re
import unicodedata
from collections.abc import Iterable
from pathlib import Path

__all__ = ["VIEWS", "is_split", "refuse_other_folders", "refuse_other_sets"]

OTHER_SETS = {
    "PRCC": r"[ABC]_cropped_rgb\d+\.\w+|[ABC]/\d+/cropped_rgb\d+\.\w+",
    "CUHK01": r"campus/\d{7}\.png",
    "CUHK02": r"P[1-5]/cam[12]/\d{3}_\d{3}\.png",
    "CUHK03": r"images_(detected|labell?ed)/\d+_\d+_\d+_\d+\.png",
    "CUHK-SYSU": r"SSM/s\d+\.jpg",
    "GRID": r"(probe|gallery)/\d{4}_\d_[\d_]+\.jpe?g",
    "iLIDS-VID": r"cam[12]/person\d{3}/.+",
    "PRID2011": r"cam_[ab]/person_\d{4}(/\d+)?\.png",
    "VIPeR": r"cam_[ab]/\d{3}_\d+\.bmp",
    "Partial-REID": r"(partial|occluded|whole)_body_images/\d{3}_\d{3}\.\w+",
    "Occluded-REID": r"(occluded|whole)_body_images/\d{3}/\d{3}_\d+\.\w+",
    "P-DukeMTMC-reID": r"(occluded|whole)_body_images/\d+/.*c\d_?f\d+.*",
    "VC-Clothes": r"(train|query|gallery)/\d{4}-\d{2}-\d{2}-\d{2}\.\w+",
    "SYSU-MM01": r"cam[1-6]/\d{4}/\d{4}\.jpg",
    "RegDB": r"(Thermal|Visible)/\d+/.+\.bmp",
    "DeepChange": r"(train-set|(val|test)-set-\w+)/.+",
    "VehicleID": r"image/\d{7}\.jpg",
}
"""Public sets whose folders do not tell identities and cameras, by the ends of their paths."""
SPLIT_WORD = re.compile(r"(train|test|query|querie|gallery|gallerie|probe)(ing|val|set|split|image|data)?s?")
HELD_OUT_WORD = re.compile(r"(val|valid|validation|dev|eval|evaluation|held|out|holdout|distractor|junk|set|\d+)s?")
SET_WORD = re.compile(
    r"(val|valid|validation|split|(sub|data)?set|data|image|img|frame|crop|picture|photo|bbox|bounding|box(es)?|"
    r"label(l?ed)?|unlabel(l?ed)?|detected|detection|multi|single|shot|all|mask|junk|distractor|sequence|seq|session|"
    r"clip|scene|partial|occluded|whole|holistic|body|thermal|visible|infrared|rgb|depth|sketch|fold|batch|batche|"
    r"part|chunk|shard|folder|tracklet|\d+)s?"
)
VIEWS = r"(?:cam|camera|view|viewpoint|video|channel|stream|sensor|site|location)"
CAMERA_FOLDER = re.compile(rf"{VIEWS}[ _-]*\d+|{VIEWS}[ _-]+[a-z]|cameras?|cams|views?|videos?|(c|ch)[ _-]?\d+(s\d+)?")
CAMERA_WORD = re.compile(r".*(cam|cctv|[ck]amera|camara)s?[a-z]?")  # ipcam, kamera, camA
TIME_WORD = re.compile(
    r"(mon|tues?|wed(nes)?|thu(rs)?|fri|sat(ur)?|sun)(day)?|(week|mid|to)?day|weekend|jan(uary)?|feb(ruary)?|mar(ch)?|"
    r"apr(il)?|may|june?|july?|aug(ust)?|sept?(ember)?|oct(ober)?|nov(ember)?|dec(ember)?|spring|summer|autumn|fall|"
    r"winter|dawn|(fore|after)?noon|(mid)?night|dusk|am|pm|(year|month|week|day|hour|minute|morning|evening|time|date)s?"
)
PLACE_WORD = re.compile(
    r"left|right|front|back|rear|side|top|bottom|middle|cent(er|re)|upper|lower|north|south|east|west|inside|outside|"
    r"in(door)?|out(door)?|entrance|entry|exit|lobby|gate|door|hall(way)?|corridor|street|parking|stairs?|lift|"
    r"elevator|floor|room|st|nd|rd|th"
)
DATE = re.compile(
    r"(?<!\d)((19|20)\d\d([-_. ]?)(0[1-9]|1[0-2])\3(0[1-9]|[12]\d|3[01])|\d{1,2}[-_. ]\d{1,2}[-_. ](19|20)\d\d)"
    r"([T _-]+([01]\d|2[0-3])[-_.:h]?[0-5]\d([-_.:m]?[0-5]\d)?s?)?(?!\d)"
)


def is_split(name: str) -> bool:
    """Whether a folder beside those of splits is named as another split."""
    words = _words(name)
    return any(map(SPLIT_WORD.fullmatch, words)) or (bool(words) and all(map(HELD_OUT_WORD.fullmatch, words)))


def refuse_other_sets(root: Path, names: Iterable[str]) -> None:
    """Refuse images that are named as in a public set whose folders are not those of identities.

    Raises:
        ValueError: If there is one.
    """
    for name in names:
        for known, pattern in OTHER_SETS.items():
            if re.search(f"(^|/)({pattern})$", f"{root.name}/{name}"):
                raise ValueError(
                    f"{root / name}: named as in {known}, whose folders do not tell identities and cameras; expected a "
                    "CSV file with the columns path,pid,camid,split"
                )


def refuse_other_folders(root: Path, folders: list[str]) -> None:
    """Refuse folders of images that are named as no identity is.

    One folder named as a split, set or numbered camera is enough. Words of cameras, times and places can be names of
    persons too, as May is, so they count where every folder has them, apart from junk and distractors.

    Raises:
        ValueError: If there is one.
    """
    kinds: dict[str, list[str]] = {"a camera": [], "a split or set": []}
    for folder in folders:
        words = _words(folder)
        if CAMERA_FOLDER.fullmatch(folder.strip().lower()):
            kinds["a camera"].append(folder)
        elif any(map(SPLIT_WORD.fullmatch, words)) or (
            not all(map(str.isdecimal, words)) and all(map(SET_WORD.fullmatch, words))
        ):
            kinds["a split or set"].append(folder)
    persons = [folder for folder in folders if folder.strip("0") not in ("", "-1")]
    if all(map(_is_scene, persons)):
        kinds["a camera, time or place"] = persons
    for kind, names in kinds.items():
        if names:
            shown = ", ".join(names[:3]) + (", .." if len(names) > 3 else "")
            raise ValueError(
                f"{root}: {'a folder is' if len(names) == 1 else f'{len(names)} folders are'} named like {kind}, not "
                f"like an identity: {shown}; expected {root.name}/ID/*.jpg, or train/, query/ and gallery/ with a "
                "folder for each identity, or a CSV file with the columns path,pid,camid,split"
            )


def _is_scene(folder: str) -> bool:
    """Whether a name has a word of cameras, or words of sets, cameras, times and places alone, or is a date."""
    if DATE.fullmatch(folder.strip()):
        return True
    known = (SET_WORD, TIME_WORD, PLACE_WORD, re.compile(f"{VIEWS}s?"))
    for text in (folder, re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder)):
        words = [word for word in _words(DATE.sub(" ", text)) if not word.isdecimal()]
        if any(map(CAMERA_WORD.fullmatch, words)):
            return True
        words = [word for word in words if len(word) > 1]
        if words and all(any(pattern.fullmatch(word) for pattern in known) for word in words):
            return True
    return False


def _words(name: str) -> list[str]:
    """Words of letters and numbers in a name, in lower case and without accents."""
    letters = (c for c in unicodedata.normalize("NFKD", name) if not unicodedata.combining(c))
    return re.findall(r"[^\W\d_]+|\d+", "".join(letters).lower())
