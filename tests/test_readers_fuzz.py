"""No content of a data set gets a traceback out of the readers.

Random bytes, broken files of every kind, references of every shape.
"""

import io, logging, warnings, zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image

from smsbench.core import InputError
from smsbench.data.files import scan_files
from smsbench.data.images import IMAGE_REASONS, FileError, read_bytes, read_image

SECRET = 'SECRET^PATIENT'
FILM = np.random.default_rng(0).integers(0, 256, (24, 20), np.uint8)


def saved(kind, a=FILM, **k):
    b = io.BytesIO()
    Image.fromarray(a).save(b, kind, **k)
    return b.getvalue()


def arrays(**a):
    b = io.BytesIO()
    np.savez_compressed(b, **a)
    return b.getvalue()


def dicom(a=FILM, rle=False, **tags):
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, RLELossless

    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID, ds.SOPClassUID, ds.SOPInstanceUID = (
        ExplicitVRLittleEndian,
        '1.2.840.10008.5.1.4.1.1.1.1',
        '1.2.3',
    )
    ds.PatientName, ds.PatientID, ds.PatientComments = SECRET, SECRET, SECRET
    ds.Rows, ds.Columns, ds.SamplesPerPixel, ds.PhotometricInterpretation = (
        *a.shape,
        1,
        'MONOCHROME1',
    )
    ds.BitsAllocated = ds.BitsStored = 8 * a.itemsize
    ds.HighBit, ds.PixelRepresentation, ds.WindowCenter, ds.WindowWidth = (
        ds.BitsStored - 1,
        0,
        '120',
        '80',
    )
    ds.PixelData = a.tobytes()
    ds['PixelData'].VR = 'OW' if a.itemsize > 1 else 'OB'
    for k, v in tags.items():
        setattr(ds, k, v)
    if rle:
        ds.compress(RLELossless)
    b = io.BytesIO()
    ds.save_as(b, enforce_file_format=True)
    return b.getvalue()


def packed(name, data):
    b = io.BytesIO()
    with zipfile.ZipFile(b, 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr(name, data)
    return b.getvalue()


deep = FILM.astype('<u2') * 16
VALID = {  # reference -> a whole file
    'grey.png': saved('PNG'),
    'deep.png': saved('PNG', deep),
    'alpha.png': saved('PNG', np.dstack([FILM] * 4)),
    'palette.png': (lambda b: (Image.fromarray(FILM).quantize(16).save(b, 'PNG'), b.getvalue())[1])(
        io.BytesIO()
    ),
    'grey.jpg': saved('JPEG'),
    'colour.jpeg': saved('JPEG', np.dstack([FILM] * 3), progressive=True),
    'a.npz#film': arrays(film=FILM, other=deep),
    'b.npz#deep': arrays(deep=deep / 7),
    'grey.dcm': dicom(),
    'deep.dcm': dicom(deep),
    'rle.dcm': dicom(deep, rle=True),
    'rescaled.dicom': dicom(deep, RescaleSlope='2', RescaleIntercept='-9'),
    'a.zip!in/grey.png': packed('in/grey.png', saved('PNG')),
    'b.zip!a.npz#film': packed('a.npz', arrays(film=FILM)),
    'c.zip!a.dcm': packed('a.dcm', dicom()),
}
ENDINGS = [
    'png',
    'jpg',
    'jpeg',
    'npz#film',
    'npz',
    'dcm',
    'dicom',
    'zip!in/a.png',
    'zip!a.npz#film',
    'zip!a.dcm',
    'bmp',
    'zip',
    '',
]
quick = settings(
    deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


def write(root, ref, data):
    Path(root, ref.partition('!')[0].partition('#')[0]).write_bytes(data)


def image_or_line(root, ref, remote=False):
    "The image, or None where one line said why not; whatever else comes out fails the test."
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        try:
            a = read_image(root, ref, remote)
        except FileError as e:
            assert (
                '\n' not in str(e)
                and str(root) not in str(e)
                and SECRET not in str(e)
                and e.reason in IMAGE_REASONS
            ), str(e)
            assert 'site-packages' not in str(e) and len(str(e)) < 300 + 4 * len(ref)
            return None
        finally:
            assert not said, said[0].message  # a warning would print a path of this machine
    assert a.dtype == np.uint8 and a.ndim in (2, 3) and a.shape[2:] in ((), (3,)) and a.size
    return a


def test_the_valid_files_are_read(tmp_path):
    for ref, data in VALID.items():
        write(tmp_path, ref, data)
        assert image_or_line(tmp_path, ref) is not None, ref


@given(
    st.binary(max_size=400),
    st.sampled_from(ENDINGS),
    st.sampled_from(
        [
            b'',
            b'\x89PNG\r\n\x1a\n',
            b'\xff\xd8\xff',
            b'PK\x03\x04',
            bytes(128) + b'DICM',
            bytes(128) + b'DICM\x02\x00\x00\x00UL\x04\x00\x00\x00\x00\x00',
            b'\x93NUMPY\x01\x00',
        ]
    ),
)
@settings(quick, max_examples=400)
def test_random_bytes(tmp_path, data, ending, start):
    ref = f'a.{ending}' if ending else 'a'
    write(tmp_path, ref, start + data)
    image_or_line(tmp_path, ref)


change = st.tuples(
    st.sampled_from(['flip', 'cut', 'drop', 'put', 'double']),
    st.floats(0, 1),
    st.binary(min_size=1, max_size=8),
)


def mutated(data, changes):
    for how, where, some in changes:
        at = int(where * max(len(data) - 1, 0))
        if how == 'flip':
            data = data[:at] + some + data[at + len(some) :]
        if how == 'cut':
            data = data[:at]
        if how == 'drop':
            data = data[:at] + data[at + len(some) :]
        if how == 'put':
            data = data[:at] + some + data[at:]
        if how == 'double':
            data = data[:at] + data[at // 2 :]
    return data


@given(st.sampled_from(sorted(VALID)), st.lists(change, min_size=1, max_size=4))
@settings(quick, max_examples=900)
def test_broken_files(tmp_path, ref, changes):
    write(tmp_path, ref, mutated(VALID[ref], changes))
    image_or_line(tmp_path, ref)


@given(
    st.sampled_from(['grey.dcm', 'deep.dcm', 'rle.dcm', 'rescaled.dicom']),
    st.lists(
        st.tuples(st.integers(0, 10**6), st.binary(min_size=1, max_size=4)), min_size=1, max_size=3
    ),
)
@settings(quick, max_examples=400)
def test_broken_dicom_headers(tmp_path, ref, changes):
    data = bytearray(VALID[ref])
    end = bytes(data).index(b'\xe0\x7f\x10\x00') + 12  # up to the pixels' own header
    for at, some in changes:
        data[at % end : at % end + len(some)] = some
    write(tmp_path, ref, bytes(data))
    image_or_line(tmp_path, ref)


@given(st.sampled_from(sorted(VALID)), st.floats(0, 1, exclude_max=True))
@settings(quick, max_examples=300)
def test_a_cut_file_is_refused_or_exact(tmp_path, ref, where):
    data = VALID[ref]
    write(tmp_path, ref, data)
    whole = image_or_line(tmp_path, ref)
    write(tmp_path, 'cut-' + ref, data[: int(where * len(data))])
    cut = image_or_line(tmp_path, 'cut-' + ref)
    assert cut is None or np.array_equal(cut, whole)


piece = st.sampled_from(
    [
        'grey.png',
        'a.zip',
        'in/grey.png',
        'a.npz',
        'film',
        '!',
        '#',
        '..',
        '/',
        '\\',
        ':',
        '://',
        '::',
        '\0',
        '\n',
        '\ud800',
        'C:',
        '~',
        '*',
        '%2e%2e',
        '.png',
        '.dcm',
        '.npz',
        '.zip',
        'file',
        'memory',
        'phantom',
        'data',
        'local',
        '?',
        '@',
    ]
) | st.text(max_size=4)


@given(st.lists(piece, max_size=7).map(''.join), st.booleans())
@settings(quick, max_examples=500)
def test_any_reference(tmp_path, ref, remote):
    if not (tmp_path / 'grey.png').exists():
        for r, data in VALID.items():
            write(tmp_path, r, data)
    scheme = ref.partition(':')[0].lower()
    image_or_line(
        tmp_path, ref, remote and scheme in ('file', 'memory', 'phantom', 'data', 'local')
    )  # no test asks a host
    try:
        read_bytes(tmp_path, ref)
    except InputError as e:
        assert '\n' not in str(e) and str(tmp_path) not in str(e)


@given(
    st.lists(
        st.sampled_from(sorted(VALID))
        | st.sampled_from(['no.png', '../a.png', '', 'https://host/a.png', 'zero.png', '\ud800']),
        max_size=12,
    ),
    st.lists(change, max_size=2),
)
@settings(quick, max_examples=40)
def test_a_scan_accounts_for_every_reference(tmp_path, refs, changes):
    for ref in refs:
        if ref in VALID:
            write(tmp_path, ref, mutated(VALID[ref], changes))
    write(tmp_path, 'zero.png', b'')
    files = scan_files(tmp_path, refs, workers=1)
    assert files.index.tolist() == list(dict.fromkeys(refs)) and set(files.reason) <= {
        '',
        *IMAGE_REASONS,
    }
    assert (
        ((files.reason == '') == (files.image_sha != '')).all()
        and ((files.reason == '') == (files.detail == '')).all()
        and not files.detail.str.contains('\n').any()
    )


@pytest.mark.parametrize('ref', [r for r in VALID if r.endswith(('dcm', 'dicom'))])
def test_patients_stay_out_of_errors_and_logs(tmp_path, ref, caplog, capfd):
    """Each byte of the header is changed once.

    Neither message, log nor output may show a patient's tag.
    """
    data = packed('a.dcm', VALID['grey.dcm']) if '.zip' in ref else VALID[ref]
    end = data.find(b'\xe0\x7f\x10\x00') if '.zip' not in ref else len(data)
    with caplog.at_level(logging.DEBUG):
        for at in range(132, end, 3):
            write(tmp_path, ref, data[:at] + bytes([data[at] ^ 0x15]) + data[at + 1 :])
            image_or_line(tmp_path, ref)
    assert SECRET not in caplog.text and SECRET not in ''.join(capfd.readouterr())
