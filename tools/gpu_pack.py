"""Pack what `gpu_check.py` needs on a machine that reaches no package registry: wheels, and CIFAR-10 as mosaics.
It is packed in parts, each of which can travel together with the project's own files"""
import argparse, io, json, shutil, subprocess, sys, tempfile
from importlib import metadata
from pathlib import Path

from gpu_check import PROJECT, blobs, images_of

sys.path.insert(0, str(PROJECT))

# what such a machine, made for deep learning, is likely to lack
LACKING = ('albumentations','albucore','stringzilla','simsimd','pydantic','pydantic_core','annotated-types',
           'typing-inspection','fastcore')
# and what else the package imports, beside torch and what torch needs itself
OTHERS = ('torchvision','numpy','opencv-python-headless','scipy','scikit-learn','joblib','threadpoolctl','narwhals',
          'matplotlib','contourpy','cycler','fonttools','kiwisolver','pyparsing','python-dateutil','six','packaging',
          'pillow','safetensors','tqdm','PyYAML','filelock','jinja2','markupsafe')
OF_TORCH = {'torchvision': '0.26.0'} # that goes with torch 2.11; others in the version that is here
PLATFORMS = [f'manylinux_2_{n}_x86_64' for n in (28,27,24,17)] + ['manylinux2014_x86_64']

def fetch_wheels(names, folder, python):
    "Download wheels, one for each name, for Linux on x86-64 and that Python"
    pip = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--implementation', 'cp',
           '--python-version', python, *(f'--platform={p}' for p in PLATFORMS), '-d', str(folder)]
    subprocess.run([*pip, *(f'{name}=={OF_TORCH.get(name) or metadata.version(name)}' for name in names)], check=True)
    return sorted(folder.glob('*.whl'))

def mosaic(images):
    "Images uint8 (n, 32, 32, 3), n up to 2,500, as one lossless WebP: bytes"
    from PIL import Image
    rows = len(images)//50
    pixels = images.reshape(rows, 50, 32, 32, 3).swapaxes(1,2).reshape(32*rows, 1600, 3)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, 'WEBP', lossless=True, quality=75, method=4, exact=True)
    return out.getvalue()

def packed_cifar10():
    "Mosaics of all images; the labels as bytes; what has to be known of them. Each mosaic is looked at again"
    import numpy as np
    from cifar_gradcam.data import cifar10
    both = [cifar10(split, download=False) for split in ('train','test')]
    images = np.concatenate([d.images for d in both])
    mosaics = [mosaic(images[i:i+2500]) for i in range(0, len(images), 2500)]
    if not np.array_equal(np.concatenate([*map(images_of, mosaics)]), images):
        raise ValueError('WebP has not kept every pixel')
    about = dict(n_train=len(both[0]), fingerprints=[d.fingerprint for d in both])
    return mosaics, np.concatenate([d.labels for d in both]).astype(np.uint8).tobytes(), about

def own_size():
    "Bytes of the project's files, as far as they are in the working tree"
    listed = subprocess.run(['git', '-C', PROJECT, 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                            capture_output=True, text=True, check=True).stdout
    return sum((PROJECT/f).stat().st_size for f in filter(None, listed.split('\0')) if (PROJECT/f).is_file())

class Parts:
    "Folders `part-1`, `part-2` ..., none with more bytes than there is room for"
    def __init__(self, folder, room): self.folder,self.room,self.sizes = folder,room,[0]

    def place(self, size): # the folder for a file of that size, a new one if need be
        if size > self.room:
            raise ValueError(f'{size/1e6:.1f} MB are more than the {self.room/1e6:.1f} MB that a part has room for: '
                             'leave more of the project behind, or raise --limit')
        if self.sizes[-1]+size > self.room: self.sizes.append(0)
        self.sizes[-1] += size
        return self.folder/f'part-{len(self.sizes)}'

    def add(self, name, data): # a file
        path = self.place(len(data))/name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

def pack(out, limit, wheels, python):
    "Make the parts, and say what each transfer comes to"
    own = own_size()
    for old in out.glob('part-*'): shutil.rmtree(old)
    parts = Parts(out, limit*1e6 - own - 1e5)
    with tempfile.TemporaryDirectory() as folder:
        for w in fetch_wheels(wheels, Path(folder), python): parts.add(f'wheels/{w.name}', w.read_bytes())
    mosaics,labels,about = packed_cifar10()
    parts.add('labels.bin', labels)
    written = {} # name of a file of mosaics -> its path
    for m in mosaics:
        folder = parts.place(len(m)+4)
        path = written.setdefault(folder, folder/f'cifar-{len(written)+1}.bin')
        folder.mkdir(parents=True, exist_ok=True)
        with path.open('ab') as f: f.write(len(m).to_bytes(4, 'little') + m)
    about['files'] = len(written)
    for k in range(len(parts.sizes)): (out/f'part-{k+1}/about.json').write_text(json.dumps(about))
    if [m for path in written.values() for m in blobs(path)] != mosaics: raise ValueError('a file is not whole')
    of_wheels = sum(w.stat().st_size for w in out.glob('*/wheels/*'))
    for what,size in (('the project', own), ('wheels', of_wheels), ('CIFAR-10', sum(map(len, mosaics)))):
        print(f'{what}: {size/1e6:.1f} MB')
    for k,size in enumerate(parts.sizes):
        print(f'part-{k+1}: {size/1e6:.1f} MB, with the project {(own+size)/1e6:.1f} MB')

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--out', type=Path, default=PROJECT/'build/gpu', help='folder for the parts (%(default)s)')
    p.add_argument('--limit', type=float, default=64, help='of a transfer, the project included, MB (%(default)g)')
    p.add_argument('--bare', action='store_true', help='all packages but torch and its own, not only the rarer ones')
    p.add_argument('--python', default='3.12', help='version of Python there (%(default)s)')
    a = p.parse_args()
    pack(a.out, a.limit, LACKING + OTHERS*a.bare, a.python)

if __name__ == '__main__': main()
