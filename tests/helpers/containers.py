"""Ways in which people keep pictures: each writes `(name, content)` of some files, and gives the path to train on."""

import csv
import gzip
import io
import json
import os
import tarfile
import zipfile
from functools import partial

import datasets
import pyarrow
import pyarrow.parquet


def tree(folder, files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def zipped(folder, files, name="set.zip", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(tree(folder, []) / name, "w", method) as archive:
        for inner, content in files:
            archive.writestr(inner, content)
    return folder / name


def tarred(folder, files, name="set.tar", mode="w", form=tarfile.DEFAULT_FORMAT):
    with tarfile.open(tree(folder, []) / name, mode, format=form) as archive:
        for inner, content in files:
            about = tarfile.TarInfo(inner)
            about.size = len(content)
            archive.addfile(about, io.BytesIO(content))
    return folder / name


def as_rows(files):
    return [{"image": {"bytes": content, "path": name}} for name, content in files]


def columns(rows, more):
    """Rows with further columns."""
    return [
        {**row, **{name: values[number] for name, values in (more or {}).items()}} for number, row in enumerate(rows)
    ]


def parquet(folder, files, more=None, **options):
    path = folder / "set.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(columns(as_rows(files), more)), path, **options)
    return path


def bare_bytes(folder, files):
    table = pyarrow.table({"jpg": [content for _, content in files]})
    pyarrow.parquet.write_table(table, folder / "set.parquet")
    return folder / "set.parquet"


def image_set(files):
    return datasets.Dataset.from_list(as_rows(files)).cast_column("image", datasets.Image(decode=False))


def featured(folder, files):
    image_set(files).to_parquet(folder / "set.parquet")
    return folder / "set.parquet"


def shards(folder, files, pattern="train-{:05}-of-00003.parquet"):
    for number, file in enumerate(files):
        image_set([file]).to_parquet(folder / pattern.format(number))
    return folder


def saved_to_disk(folder, files):
    image_set(files).save_to_disk(folder / "set")
    return folder / "set"


def saved_splits(folder, files):
    datasets.DatasetDict(train=image_set(files), test=image_set(files[:1])).save_to_disk(folder / "set")
    return folder / "set"


def arrow(folder, files):
    return next(saved_to_disk(folder, files).glob("*.arrow"))


def listed(folder, files, name="set.csv", column="file_name", absolute=False, more=None):
    """A table of paths beside the pictures."""
    tree(folder, files)
    rows = columns([{column: str(folder / file) if absolute else file} for file, _ in files], more)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith("l"):
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        elif name.endswith("json"):
            json.dump(rows, file)
        else:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if name.endswith("tsv") else ",")
            writer.writeheader()
            writer.writerows(rows)
    return folder / name


def metadata(folder, files, name="metadata.jsonl", more=None):
    listed(folder, files, name, more=more)
    return folder


def webdataset(folder, files, name="set.tar", mode="w", notes=((".json", b'{"class": 1}'), (".cls", b"1"))):
    together = [(f"{n:04}.{inner.rpartition('.')[2]}", content) for n, (inner, content) in enumerate(files)]
    return tarred(
        folder,
        [file for one in together for file in (one, *((one[0][:4] + suffix, text) for suffix, text in notes))],
        name,
        mode,
    )


def linked_files(folder, files):
    outside = tree(folder / "outside", files)
    (folder / "set").mkdir()
    for name, _ in files:
        os.symlink(outside / name, folder / "set" / name)
    return folder / "set"


def linked_folder(folder, files):
    outside = tree(folder / "outside", files[1:])
    tree(folder / "set", files[:1])
    os.symlink(outside, folder / "set" / "more", target_is_directory=True)
    os.symlink(folder / "set", folder / "set" / "itself", target_is_directory=True)
    return folder / "set"


def renamed(pattern, container=tree):
    """Files by other names: {0} is the number, {1} the name, {2} the suffix."""

    def write(folder, files):
        names = (pattern.format(number, name, "." + name.rpartition(".")[2]) for number, (name, _) in enumerate(files))
        return container(folder, [(name, content) for name, (_, content) in zip(names, files, strict=True)])

    return write


def beside(*others, container=tree):
    """With other files, whose content is no picture."""
    return lambda folder, files: container(folder, [*files, *((name, b"no picture") for name in others)])


def both(folder, files):
    zipped(folder / "set", files[1:])
    return tree(folder / "set", files[:1])


def gzipped(folder, files):
    path = tarred(folder, files)
    path.with_suffix(".tar.gz").write_bytes(gzip.compress(path.read_bytes()))
    return path.with_suffix(".tar.gz")


def listed_zip(folder, files):
    return zipped(folder, [*files, ("metadata.csv", b"file_name\n" + files[0][0].encode())])


CONTAINERS = {
    "a folder": tree,
    "folders in folders": renamed("a/b c/{0}/d/{1}"),
    "the same name in different folders": renamed("{0}/picture{2}"),
    "names with accents, spaces and signs": renamed("Bilder für Ä/日本 {0} #1 100%;'&{2}"),
    "names with commas and quotes": renamed('a, "b" {0}{2}'),
    "names with dots": renamed("photo.v1.{0}{2}"),
    "names with words for splits": renamed("train_{0}_test{2}"),
    "files in a folder train": renamed("train/{1}"),
    "hidden files beside": beside(".DS_Store", "._1.png", "__MACOSX/1.png", ".git/1.png"),
    "notes beside": beside("README.txt", "LICENSE", "labels.csv", "Thumbs.db"),
    "links to files": linked_files,
    "a link to a folder, and one to itself": linked_folder,
    "a zip": zipped,
    "a zip without compression": partial(zipped, method=zipfile.ZIP_STORED),
    "a zip in capitals": partial(zipped, name="SET.ZIP"),
    "folders in a zip": renamed("a/ö {0}/{1}", zipped),
    "the same name in different folders of a zip": renamed("{0}/picture{2}", zipped),
    "a zip of a Mac": beside("__MACOSX/._1.png", ".DS_Store", container=zipped),
    "a zip with metadata": listed_zip,
    "a zip beside pictures": both,
    "a tar": tarred,
    "a tar of ustar": partial(tarred, form=tarfile.USTAR_FORMAT),
    "a tar of GNU": partial(tarred, form=tarfile.GNU_FORMAT),
    "a tar with long names": renamed("ü" * 90 + "/{0}" + "x" * 90 + "{2}", tarred),
    "a tar of names with dots": renamed("cat.{0}{2}", tarred),
    "a tar with notes": beside("README.txt", container=tarred),
    "folders in a tar": renamed("v1.0/{0}/{1}", tarred),
    "a tar.gz": gzipped,
    "a tgz": partial(tarred, name="set.tgz", mode="w:gz"),
    "a tar.bz2": partial(tarred, name="set.tar.bz2", mode="w:bz2"),
    "a tar.xz": partial(tarred, name="set.tar.xz", mode="w:xz"),
    "a webdataset": webdataset,
    "a webdataset, compressed": partial(webdataset, name="set.tar.gz", mode="w:gz"),
    "a webdataset of texts": partial(webdataset, notes=((".txt", b"ein Bild"),)),
    "a folder of webdatasets": lambda folder, files: webdataset(folder, files, "train-0000.tar").parent,
    "Parquet of bytes and paths": parquet,
    "Parquet of row groups": partial(parquet, row_group_size=1),
    "Parquet of bytes": bare_bytes,
    "Parquet of the Image feature": featured,
    "a folder of Parquet": shards,
    "a pattern of Parquet": lambda folder, files: shards(folder, files, "{}.parquet") / "*.parquet",
    "Arrow": arrow,
    "save_to_disk": saved_to_disk,
    "save_to_disk of splits": saved_splits,
    "CSV": listed,
    "TSV": partial(listed, name="set.tsv"),
    "JSON lines": partial(listed, name="set.jsonl", column="path"),
    "JSON": partial(listed, name="set.json", column="image"),
    "CSV of whole paths": partial(listed, column="filepath", absolute=True),
    "CSV of names with accents, commas and quotes": renamed('Ä/b, "c" {0}{2}', listed),
    "metadata.jsonl": metadata,
    "metadata.csv": partial(metadata, name="metadata.csv"),
    "metadata of folders": renamed("a/ö {0}/{1}", metadata),
}
