"""Which images are judged, and that withdrawn consent is honoured from every side."""

import pytest
from releases import phantom_image

from fedmed.errors import DataError
from fedmed.release.inputs import find_images


@pytest.fixture
def site(tmp_path):
    """Three patients, of whom p2 opted out."""
    root = tmp_path / "site"
    rows = ["image,patient_id,split,label"]
    for i in (1, 2, 3):
        phantom_image(root / "images" / f"{i}.png", i)
        rows.append(f"images/{i}.png,p{i},test,0")
    (root / "manifest.csv").write_text("\n".join(rows) + "\n")
    (root / "optout.csv").write_text("patient_id\np2\n")
    return root


def names(*paths):
    found = find_images(paths)
    return [item.name for item in found.items], found.opted_out


def test_a_site_folder(site):
    phantom_image(site / "images" / "unlisted.png", 4)
    assert names(site) == (["images/1.png", "images/3.png"], 1)


def test_new_patients_have_no_label(site):
    lines = (site / "manifest.csv").read_text().splitlines()
    (site / "manifest.csv").write_text("\n".join(x.rpartition(",")[0] for x in lines))
    assert names(site) == (["images/1.png", "images/3.png"], 1)
    assert names(site / "images") == (["1.png", "3.png"], 1)


def test_opt_outs_hold_for_folders_and_files_inside_a_site(site, tmp_path):
    assert names(site / "images") == (["1.png", "3.png"], 1)
    assert names(site / "images" / "2.png", site / "images" / "1.png") == (["1.png"], 1)
    (tmp_path / "linked").symlink_to(site / "images")
    assert names(tmp_path / "linked") == (["1.png", "3.png"], 1)
    (tmp_path / "two.png").symlink_to(site / "images" / "2.png")
    assert names(tmp_path / "two.png") == ([], 1)


def test_an_image_of_nobody_known_is_refused_where_there_is_a_list(site):
    path = phantom_image(site / "images" / "unlisted.png", 4)
    with pytest.raises(DataError, match="does not say whose image"):
        find_images([path])
    (site / "optout.csv").unlink()
    assert names(path) == (["unlisted.png"], 0)


@pytest.mark.parametrize("text", ["patient_id,x\n,y\n", "who\np2\n", "\xff"])
def test_a_damaged_list_stops_everything(text, site):
    (site / "optout.csv").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=r"optout\.csv"):
        find_images([site])


def test_loose_folders(tmp_path):
    for name in ("b.png", "a.JPG", "deep/c.nii.gz", ".hidden/d.png", "e.txt", "f.npy"):
        path = tmp_path / "loose" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    assert names(tmp_path / "loose") == (["a.JPG", "b.png", "deep/c.nii.gz", "f.npy"], 0)


def test_each_file_once_and_folders_told_apart(tmp_path):
    for folder in ("one", "two"):
        phantom_image(tmp_path / folder / "x.png", 1)
    found, _ = names(tmp_path / "one", tmp_path / "two", tmp_path / "one" / "x.png")
    assert found == ["one/x.png", "two/x.png"]


def test_nothing_to_judge(tmp_path):
    with pytest.raises(DataError, match="no image in"):
        find_images([tmp_path])
    with pytest.raises(DataError, match="does not exist"):
        find_images([tmp_path / "nowhere"])
