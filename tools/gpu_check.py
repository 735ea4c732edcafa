"""Check the package on a machine with one NVIDIA GPU: is everything right there, how fast is it, and a long training.
Each check's outcome is written as soon as it is known, so that what was done is kept if the machine goes away"""
import argparse, copy, io, json, math, os, re, shutil, signal, socket, subprocess, sys, tempfile, time, traceback
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from importlib import metadata
from itertools import cycle, groupby, islice
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
STORE = Path(tempfile.gettempdir())/'cifar_gradcam_gpu' # outside of the tree; there for the next call, too
PIECE = 15_000_000 # Bytes of a file that goes back, at most

# What `gpu_pack.py` made: wheels, and images in files of mosaics

def keep_parts(packed, store=STORE):
    "Put what lies in the folders `part-*` where the next calls find it"
    for path in sorted(Path(packed).glob('part-*/**/*')):
        if path.is_dir(): continue
        there = store/path.relative_to(packed).relative_to(path.relative_to(packed).parts[0])
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, there)

def is_installed(wheel):
    "Does this Python have the package of a wheel?"
    try: metadata.version(wheel.name.partition('-')[0])
    except metadata.PackageNotFoundError: return False
    return True

def install_lacking(wheels=STORE/'wheels', site=STORE/'site'):
    "Put the wheels whose packages this Python lacks into a folder of their own, and on its path"
    site.mkdir(parents=True, exist_ok=True)
    sys.path.append(str(site))
    os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, [str(PROJECT), os.environ.get('PYTHONPATH'), str(site)]))
    lacking = [w for w in sorted(wheels.glob('*.whl')) if not is_installed(w)]
    if not lacking: return
    pip = [sys.executable, '-m', 'pip', 'install', '-q', '--no-index', '--no-deps', '--no-compile']
    subprocess.run([*pip, '--target', site, *lacking], check=True)
    print('installed:', ', '.join(w.name for w in lacking), flush=True)

def blobs(path):
    "The pieces of bytes in a file, each with its length before it"
    data,at = Path(path).read_bytes(),0
    while at < len(data):
        n = int.from_bytes(data[at:at+4], 'little')
        yield data[at+4:at+4+n]
        at += 4+n

def images_of(mosaic):
    "The images of a mosaic, uint8 (n, 32, 32, 3), row by row"
    import numpy as np
    from PIL import Image
    pixels = np.asarray(Image.open(io.BytesIO(mosaic)).convert('RGB'))
    rows,columns = (side//32 for side in pixels.shape[:2])
    return pixels.reshape(rows, 32, columns, 32, 3).swapaxes(1,2).reshape(-1, 32, 32, 3)

def unpacked(store=STORE):
    "CIFAR-10's training and test images, as `ImageSet`s, checked by their fingerprints"
    import numpy as np
    from cifar_gradcam.data import CIFAR10_CLASSES, ImageSet
    if not (store/'about.json').exists(): raise NotReached('no images were packed')
    about = json.loads((store/'about.json').read_text())
    files = [store/f'cifar-{k+1}.bin' for k in range(about['files'])]
    if lacking := [f.name for f in files if not f.exists()]: raise NotReached(f"{', '.join(lacking)} is still to come")
    images = np.concatenate([images_of(m) for f in files for m in blobs(f)])
    labels = np.frombuffer((store/'labels.bin').read_bytes(), np.uint8).astype(np.int64)
    n = about['n_train']
    both = [ImageSet('CIFAR-10', split, images[part], labels[part], CIFAR10_CLASSES)
            for split,part in (('train', slice(n)), ('test', slice(n, None)))]
    if [d.fingerprint for d in both] != about['fingerprints']: raise ValueError('the images are not what was packed')
    return both

# One check after the other

class NotReached(Exception): "There is no time for a check, or something that it needs is not there"

class CutOff(BaseException): "The process was asked to leave"

class OutOfTime(BaseException): "The time for all checks is over"

def raises(error):
    "A handler of signals"
    def handler(*_): raise error
    return handler

class Context:
    "What all checks know"
    def __init__(self, parts, device, small, out, minutes, claims=None, processes=1):
        self.parts,self.device,self.small,self.out = parts,device,small,Path(out)
        self.claims,self.processes = claims,processes # where processes side by side say what they are at; their number
        self.end = time.monotonic() + 60*minutes
        self.out.mkdir(parents=True, exist_ok=True)
        self.cuda = device.type == 'cuda'

    def left(self): return self.end-time.monotonic() # seconds

    def wait(self): # until the GPU has done all that it was given
        if self.cuda:
            import torch
            torch.cuda.synchronize(self.device)

    def cifar10(self):
        "Training and test images; few where all is small"
        from cifar_gradcam.data import load_data
        if not hasattr(self, '_cifar10'):
            there = 'CIFAR_GRADCAM_DATA' in os.environ
            self._cifar10 = load_data('cifar10')[:2] if there else unpacked()
        train,test = self._cifar10
        return (train.subset(slice(512)),test.subset(slice(200))) if self.small else (train,test)

    @property
    def workers(self): # as many as were the quickest, in this call or an earlier one, and as there are cores for
        cores = max(1, ((os.cpu_count() or 2) - 2)//self.processes)
        try: return min(cores, json.loads((STORE/'workers.json').read_text()))
        except FileNotFoundError: return 1 if self.small else cores

    def takes(self, part, name): # is this check for this process?
        if not self.claims: return True
        slug = re.sub(r'\W+', '-', f'{part} {name}')
        try: os.close(os.open(Path(self.claims)/slug, os.O_CREAT|os.O_EXCL))
        except FileExistsError: return False
        return True

CHECKS = {'A': [], 'B': [], 'C': [], 'D': []} # in the order of their importance

def check(part, # A key of `CHECKS`
          seconds, # That it takes on a GPU: with less time left it is not begun
         ):
    "Makes a function of the `Context` a check. It gives what it measured, and under 'failed' what is wrong"
    def add(f):
        CHECKS[part].append((f.__name__, seconds, f))
        return f
    return add

def rounded(value):
    "The same with four digits, for people"
    if isinstance(value, float): return float(f'{value:.4g}')
    if isinstance(value, dict): return {str(k): rounded(v) for k,v in value.items()}
    return [rounded(v) for v in value] if isinstance(value, (list,tuple)) else value

def outcome(c, seconds, f):
    "Run one check: its status, and what it measured or why there is nothing"
    try:
        if c.left() < (0 if c.small else seconds): raise NotReached(f'{c.left():.0f} s left, and it takes {seconds}')
        signal.setitimer(signal.ITIMER_REAL, max(1, c.left()))
        found = f(c) or {}
        return 'failed' if found.get('failed') else 'not reached' if 'why' in found else 'passed', found
    except (NotReached,OutOfTime) as e: return 'not reached',dict(why=str(e) or 'the time is over')
    except Exception as e:
        return 'failed',dict(error=f'{type(e).__name__}: {e}', where=traceback.format_exc().splitlines()[-7:])
    finally: signal.setitimer(signal.ITIMER_REAL, 0)

def run_all(c):
    "Run the checks, and write down each one's outcome at once"
    signal.signal(signal.SIGALRM, raises(OutOfTime))
    signal.signal(signal.SIGTERM, raises(CutOff))
    counts,cut = Counter(),False
    entries = [(part, *entry) for part in c.parts for entry in CHECKS[part]]
    for part,name,seconds,f in entries:
        if not c.takes(part, name): continue
        start = time.monotonic()
        try: status,found = ('not reached',dict(why='cut off')) if cut else outcome(c, seconds, f)
        except (CutOff,KeyboardInterrupt): status,found,cut = 'not reached',dict(why='cut off'),True
        counts[status] += 1
        line = dict(name=name, status=status, seconds=time.monotonic()-start, **rounded(found))
        with (c.out/'results.jsonl').open('a') as out: out.write(json.dumps(rounded(line)) + '\n')
        print(f"{status:11} {line['seconds']:6.1f} s  {name}: {json.dumps(rounded(found))}", flush=True)
    return counts

def side_by_side(c, left):
    """Run the parts in several processes, each at another check. Steps on small images are so short that a GPU waits
    for what one process asks of it. `left`: minutes"""
    with tempfile.TemporaryDirectory() as claims:
        own = dict(device=c.device, out=c.out, minutes=left, processes=c.processes, claims=claims)
        options = [word for name,value in own.items() for word in (f'--{name}', str(value))] + ['--small']*c.small
        command = [sys.executable, __file__, '--part', *c.parts, *options]
        with (c.out/'results.jsonl').open('a') as f: begin = f.tell()
        children = [subprocess.Popen(command) for _ in range(c.processes)]
        def pass_on(*_):
            for child in children: child.terminate()
        signal.signal(signal.SIGTERM, pass_on)
        crashed = sum(child.wait() not in (0,1) for child in children)
    with (c.out/'results.jsonl').open() as f:
        f.seek(begin)
        counts = Counter(json.loads(line)['status'] for line in f)
    counts['failed'] += crashed
    return counts

# What several checks need

@contextmanager
def exactly():
    "In this block convolutions are in full float32, and by kernels that give the same bits again"
    import torch
    cudnn = torch.backends.cudnn
    before = cudnn.allow_tf32,cudnn.deterministic
    cudnn.allow_tf32,cudnn.deterministic = False,True
    try: yield
    finally: cudnn.allow_tf32,cudnn.deterministic = before

@contextmanager
def stopping_after(c, seconds):
    "In this block a signal asks the training to save and leave, after so many seconds; it does not end the process"
    def ask(*_): signal.raise_signal(signal.SIGTERM)
    before = {s: signal.signal(s, f) for s,f in ((signal.SIGALRM, ask), (signal.SIGTERM, lambda *_: None))}
    signal.setitimer(signal.ITIMER_REAL, max(1, seconds), 5) # and again, should it come too early to be heard
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for s,handler in before.items(): signal.signal(s, handler)
        signal.setitimer(signal.ITIMER_REAL, max(1, c.left()))

def off(got, want):
    """How far maps or logits are from what they should be, as shares of the largest number of each: the median and the
    worst. Numbers that are faint beside those of the other images count as a twentieth of the largest of all"""
    got,want = (t.detach().double().cpu().flatten(1) for t in (got, want))
    largest = want.abs().amax(1)
    share = (got-want).abs().amax(1)/largest.clamp(min=max(1e-30, largest.max()/20))
    return dict(typical=float(share.median()), worst=float(share.max()))

def close(found):
    "Is what `off` found nothing but rounding? Where that switches a ReLU on or off, a few maps differ by more"
    return found['typical'] <= 1e-3 and found['worst'] <= 3e-2

def alike(got, want):
    "Rank correlation of maps: the mean and the lowest, of those that are not flat"
    from cifar_gradcam.scores import spearman
    r = spearman(got.float().cpu(), want.float().cpu())
    r = r[~r.isnan()]
    return dict(mean=float(r.mean()), lowest=float(r.min()))

def examples(c, n=64):
    "The network that comes with the package, on the CPU, and normalised images (n, 3, 32, 32)"
    from cifar_gradcam.data import loader, shapes
    from cifar_gradcam.model import PRETRAINED, load_model
    from cifar_gradcam.transforms import test_transforms
    network,info = load_model(PRETRAINED)
    n = min(n, 4) if c.small else n
    try: data = c.cifar10()[1].subset(slice(n))
    except NotReached: data = shapes('test', n)
    return network,next(iter(loader(data, test_transforms(info.mean, info.std), n)))[0]

def moved(c, network): return copy.deepcopy(network).to(c.device)

def lesson(c, **changes):
    "A recipe of six steps in two stages, and 512 images of Shapes"
    from cifar_gradcam.data import shapes
    from cifar_gradcam.training import Recipe
    recipe = Recipe('check', sizes=(16,24), epochs=(3/8,3/8), lr=.05, muon_lr=.05, ema=.9, batch_size=64,
                    network='tiny' if c.small else 'resnet18')
    return replace(recipe, **changes),shapes('train', 512)

@contextmanager
def number_format(name):
    "In this block a `Trainer` with amp=True computes in this format, whatever the chip likes best"
    import torch
    from cifar_gradcam import training
    before,dtype = training.amp_dtype,getattr(torch, name)
    training.amp_dtype = lambda device: dtype
    try: yield
    finally: training.amp_dtype = before

def formats(c):
    "Number formats to train in"
    import torch
    wide = not c.cuda or torch.cuda.is_bf16_supported(including_emulation=False)
    return ('float32', 'bfloat16', 'float16') if wide else ('float32', 'float16')

def weights_off(a, b):
    "Are two networks' weights the same bit for bit; and how far the one's are from the other's, as in `off`"
    pairs = [(a.state_dict()[k].float().reshape(1,-1), v.float().reshape(1,-1)) for k,v in b.state_dict().items()]
    worst = max(off(x, y)['worst'] for x,y in pairs)
    return dict(same_bits=all(bool((x == y).all()) for x,y in pairs), off=worst)

# Part A: is everything right, and how fast is it?

@check('A', 2)
def environment(c):
    "What there is"
    import torch
    from cifar_gradcam.commands import versions
    from cifar_gradcam.training import amp_dtype
    found = versions() | dict(cpus=os.cpu_count(), format=str(amp_dtype(c.device)), device=str(c.device))
    if not c.cuda: return found
    ask = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
    try: driver = subprocess.run(ask, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError,subprocess.TimeoutExpired): driver = 'unknown'
    gpu = torch.cuda.get_device_properties(c.device)
    return found | dict(gpu=gpu.name, capability=f'{gpu.major}.{gpu.minor}', gigabytes=gpu.total_memory/1e9,
                        cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver,
                        bfloat16=torch.cuda.is_bf16_supported(including_emulation=False))

@check('A', 4)
def gradcam(c):
    "GradCAM at several layers: the maps of the CPU; and how far they are where convolutions may take TF32"
    from cifar_gradcam.gradcam import GradCAM
    network,x = examples(c)
    there,target = moved(c, network),network(x).argmax(1)
    found = dict(float32={}, tf32={}, failed=[])
    for layer in (None, 'layer1', 'layer2', 'layer3', 'layer4', 'layer3.0.conv2', ['layer2','layer4']):
        name = '+'.join(layer) if isinstance(layer, list) else str(layer)
        want = GradCAM(network, layer)(x, target)
        with exactly(): got = GradCAM(there, layer)(x.to(c.device), target)
        quick = GradCAM(there, layer)(x.to(c.device), target)
        found['float32'][name],found['tf32'][name] = off(got.raw, want.raw),alike(quick.raw, want.raw)['lowest']
        right = got.raw.device == c.device and got.layer == want.layer and close(found['float32'][name])
        if not right or not close(off(got.heatmaps, want.heatmaps)): found['failed'].append(name)
    return found

@check('A', 4)
def gradcam_16_bits(c):
    "The same under autocast, and with weights of 16 bits: ranks as in float32"
    import torch
    from cifar_gradcam.gradcam import GradCAM
    network,x = examples(c)
    there,target = moved(c, network),network(x).argmax(1)
    found = dict(failed=[])
    for layer in ('layer3','layer4'):
        want = GradCAM(network, layer)(x, target).raw
        for dtype in (torch.bfloat16, torch.float16):
            kind = str(dtype).removeprefix('torch.')
            with torch.autocast(c.device.type, dtype): cast = GradCAM(there, layer)(x.to(c.device), target)
            narrow = copy.deepcopy(there).to(dtype)
            for how,r in (('autocast',cast), ('weights',GradCAM(narrow, layer)(x.to(c.device, dtype), target))):
                name = f'{layer}, {how} {kind}'
                found[name] = alike(r.raw, want)
                if found[name]['mean'] < .99: found['failed'].append(name)
    return found

def transformer():
    "A small vision transformer, the same every time, whose head is not zero"
    import torch
    from torchvision.models import VisionTransformer
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = VisionTransformer(32, 8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64, num_classes=10)
        torch.nn.init.normal_(net.heads.head.weight)
    return net.eval()

def cases(c, network, x):
    "For each method: the network, images, the target, and for each try the layer and the method's options"
    from cifar_gradcam.engine import CAMMethod
    from cifar_gradcam.methods import METHODS, ManyPasses
    from cifar_gradcam.model import tiny
    from cifar_gradcam.targets import rest
    from cifar_gradcam.training import new_network
    many = new_network(tiny, 10).eval() if c.small else network
    for name,Method in METHODS.items():
        target,own = (rest(3) if name == 'ShapleyCAM' else 3),Method.own_layers is not CAMMethod.own_layers
        if name == 'LeGrad': yield name,Method,transformer(),x[:2],target,[(None, {})]
        elif issubclass(Method, ManyPasses):
            options = dict(samples=2) if name in ('SSCAM','ISCAM') else {}
            yield name,Method,many,x[:1],target,[('layer2', options)]
        else: yield name,Method,network,x[:4],target,[(None, {})] + [('layer3', {})]*(not own and name != 'CAM')

@check('A', 20)
def methods(c):
    "Every method: the CPU's maps"
    found = dict(failed=[])
    for name,Method,network,x,target,tries in cases(c, *examples(c)):
        there = moved(c, network)
        for layer,options in tries:
            what = f'{name} at {layer}' if layer else name
            try:
                want,got = (Method(net, layer, **options) for net in (network, there))
                want.shows_progress = got.shows_progress = False
                want = want(x, target)
                with exactly(): got = got(x.to(c.device), target)
                found[what] = off(got.raw, want.raw)
                if not close(found[what]) or not want.raw.any(): found['failed'].append(what)
            except Exception as e: found['failed'].append(f'{what}: {type(e).__name__}: {e}')
    return found

class Cut(list):
    "Batches after which the power fails"
    def __iter__(self):
        yield from super().__iter__()
        raise ConnectionError('cut')

def two_inputs():
    "A network of images and of a number for each, which it takes from the CPU, as `pack_padded_sequence` does"
    import torch
    from torch import nn
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv,self.fc = nn.Conv2d(3, 8, 3, padding=1),nn.Linear(8, 10)
        def forward(self, x, scale):
            maps = torch.stack([image*factor for image,factor in zip(self.conv(x).relu(), scale.numpy().tolist())])
            return self.fc(maps.mean((2,3)))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().eval()

@check('A', 4)
def mixed_devices(c):
    "What lies on the CPU beside what lies on the GPU: inputs, targets, results; and a GPU as the default device"
    import torch
    from cifar_gradcam.gradcam import GradCAM, contrast, logit_of, rest
    from cifar_gradcam.result import CAMResult
    from cifar_gradcam.scores import auc, deletion_curve, road
    network,x = examples(c, 4)
    there,y,classes = moved(c, network),x.to(c.device),torch.tensor([3,0,8,6])
    here,away = GradCAM(network, 'layer3'),GradCAM(there, 'layer3')
    net,scale = two_inputs(),torch.tensor([1.,2,3,4])
    def padded(r): return replace(r[:2], shares=torch.tensor([[1,.5],[.5,1]]))
    def by_default(net, x):
        with torch.device(x.device): return GradCAM(net)(x, 3).raw
    def score(net, x):
        maps = here(x.cpu(), classes).heatmaps
        return torch.stack([auc(deletion_curve(net, x, maps, classes)), road(net, x, maps.to(x.device), classes)])
    cases = {
        'classes': lambda cam, x: cam(x, classes).raw,
        'logit_of': lambda cam, x: cam(x, logit_of(classes)).raw,
        'contrast': lambda cam, x: cam(x, contrast(classes, None)).raw,
        'rest': lambda cam, x: cam(x, rest(classes)).raw,
        'smooth': lambda cam, x: cam(x, 3, smooth=True).raw,
        'padded': lambda cam, x: CAMResult.cat([padded(cam(x, 3)), cam(x, 3)]).heatmaps,
        'chosen': lambda cam, x: cam(x, 3)[torch.tensor([2,0])].heatmaps,
        'drawn': lambda cam, x: torch.tensor(len(cam(x, 3)._repr_html_()) > 500).float().reshape(1,1),
        'by itself': lambda cam, x: GradCAM(cam.model)(x).raw,
        'by default': lambda cam, x: by_default(cam.model, x),
        'two inputs': lambda cam, x: GradCAM(copy.deepcopy(net).to(x.device))((x, scale), 3).raw,
        'scores': lambda cam, x: score(cam.model, x)}
    found = dict(failed=[])
    for name,ask in cases.items():
        try:
            with exactly(): found[name] = off(ask(away, y), ask(here, x))
            if not close(found[name]): found['failed'].append(name)
        except Exception as e: found['failed'].append(f'{name}: {type(e).__name__}: {e}')
    return found

@check('A', 10)
def stream(c):
    "A whole data set in 32 and 16 bits, and resumed after a cut: the maps of GradCAM"
    import torch
    from cifar_gradcam.data import shapes
    from cifar_gradcam.gradcam import GradCAM
    from cifar_gradcam.model import tiny
    from cifar_gradcam.stream import _each_by_itself
    from cifar_gradcam.training import new_network
    n = 1600 if c.small else 2600
    network,_ = examples(c, 1)
    if c.small: network = new_network(tiny, 10).eval()
    x = torch.from_numpy(shapes('test', n).images).permute(0,3,1,2)/64 - 2
    batches,cam = [*x.split(100)],GradCAM(moved(c, network), 'layer3')
    found = dict(each_by_itself=_each_by_itself(cam.model, x[:2].to(c.device)), failed=[])
    with exactly(): want = torch.cat([cam(b.to(c.device), 3).raw.cpu() for b in batches])
    for precision in (None, 'bfloat16', 'float16'):
        start = time.monotonic()
        with exactly(): r = cam.stream(batches, 3, precision=precision)
        found[f'{precision}, images/s'] = n/(time.monotonic()-start)
        found[str(precision)] = off(r.raw, want) if precision is None else alike(r.raw, want)
        good = close(found['None']) if precision is None else found[precision]['mean'] >= .99
        if not good or r.raw.device.type != 'cpu': found['failed'].append(str(precision))
    with tempfile.TemporaryDirectory() as folder, exactly():
        try: cam.stream(Cut(batches[:-1]), 3, folder)
        except ConnectionError: pass
        found['parts before the cut'] = len([*Path(folder).glob('part-*')])
        found['resumed'] = off(cam.stream(batches, 3, folder).raw, want)
        if not close(found['resumed']) or not found['parts before the cut']: found['failed'].append('resumed')
    return found

@check('A', 6)
def frozen_copies(c):
    "The quick copy: the same logits, what is folded in it, and how quick it is"
    import torch
    from torch import nn
    from cifar_gradcam.frozen import frozen, frozen_if_possible
    network,x = examples(c)
    there,y = moved(c, network),x.to(c.device)
    def time_of(net): # of a pass, s
        for k in range(13):
            if k == 3:
                c.wait()
                start = time.monotonic()
            with torch.no_grad(): net(y)
        c.wait()
        return (time.monotonic()-start)/10
    def norms(net): return sum(isinstance(m, nn.BatchNorm2d) for m in net.modules())
    found = dict(plain=dict(norms=norms(there), ms=1e3*time_of(there)), failed=[])
    for name,precision,within in (('exact',None,1e-3), ('as it comes',None,5e-3), ('bfloat16','bfloat16',.1),
                                  ('float16','float16',.1)):
        if name == 'exact':
            with exactly(): quick,want = frozen_if_possible(there, y, precision=precision),there(y)
            with exactly(): got = quick(y)
        else: quick = frozen_if_possible(there, y, precision=precision); want,got = there(y),quick(y)
        found[name] = dict(off=off(got, want)['worst'], norms=norms(quick), ms=1e3*time_of(quick))
        if not found[name]['off'] <= within or quick is there: found['failed'].append(name)
    with exactly(): found['moved there'] = off(frozen(network, x).to(c.device)(y), there(y))['worst']
    if not found['moved there'] <= 2e-3: found['failed'].append('moved there')
    return found

@check('A', 25)
def trainer_resumed(c):
    "Six steps, and the same six stopped by a signal after two and resumed: the same weights, in each number format"
    from cifar_gradcam.training import Stopped, fit
    recipe,data = lesson(c)
    def stop(history):
        if len(history.batch_loss) == 2: signal.raise_signal(signal.SIGTERM)
    found = dict(failed=[])
    for name in formats(c):
        how = dict(device=c.device, amp=name != 'float32', verbose=False)
        with number_format(name), exactly(), tempfile.TemporaryDirectory() as folder, stopping_after(c, c.left()):
            whole,stopped = fit(recipe, data, **how),False
            try: fit(recipe, data, folder=folder, save_every=0., callback=stop, **how)
            except Stopped: stopped = True
            again = fit(recipe, data, folder=folder, **how)
        found[name] = weights_off(again.net, whole.net) | dict(format=whole.history.precision,
                                                               losses=whole.history.batch_loss)
        good = stopped and again.finished and found[name]['off'] <= 1e-2 and whole.history.precision == name
        if not good: found['failed'].append(name)
    return found

@check('A', 15)
def trainer_learns(c):
    "Forty steps in each number format: the loss falls, and 16 bits don't overflow"
    from cifar_gradcam.training import fit
    recipe,data = lesson(c, sizes=(16,), epochs=(5,))
    found = dict(failed=[])
    for name in formats(c):
        with number_format(name): t = fit(recipe, data, device=c.device, amp=name != 'float32', verbose=False)
        losses = t.history.batch_loss
        first,last = sum(losses[:5])/5,sum(losses[-5:])/5
        found[name] = dict(first=first, last=last, scale=t.scaler.get_scale())
        if not last < (1 if c.small else .9)*first or not all(v.isfinite().all() for v in t.net.state_dict().values()):
            found['failed'].append(name)
    return found

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def together(c, n, how):
    "Start this script in n processes, and read what the first found"
    with tempfile.TemporaryDirectory() as folder:
        launch = [sys.executable, '-m', 'torch.distributed.run', f'--nproc-per-node={n}', '--master-addr=127.0.0.1',
                  f'--master-port={free_port()}', __file__, '--worker', how, '--out', folder, '--device', str(c.device)]
        own = os.environ | dict(GLOO_SOCKET_IFNAME='lo', NCCL_SOCKET_IFNAME='lo', OMP_NUM_THREADS='1')
        with tempfile.TemporaryFile('w+') as said:
            launch += ['--small']*c.small
            p = subprocess.Popen(launch, stdout=said, stderr=said, env=own, start_new_session=True)
            try: p.wait(min(c.left(), 180 if c.small else 60))
            finally:
                if p.poll() is None: os.killpg(p.pid, signal.SIGKILL)
            said.seek(0)
            if p.returncode: raise RuntimeError(f"{n} processes: {said.read()[-1500:]}")
        return json.loads((Path(folder)/'worker.json').read_text())

def worker(how, device, small, out):
    "One of the processes that `together` starts"
    import torch.distributed as dist
    from cifar_gradcam.processes import process_group
    from cifar_gradcam.training import pick_device
    c = Context(['A'], pick_device(device), small, out, 2)
    if how == 'gloo': dist.init_process_group('gloo')
    with process_group(c.device), exactly(): found = steps_together(c)
    if how == 'gloo': dist.destroy_process_group()
    if found['rank'] == 0: (c.out/'worker.json').write_text(json.dumps(found))

def steps_together(c):
    "Three steps, and what the processes tell each other. `DistributedDataParallel` is gone when they part"
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel
    from cifar_gradcam.processes import from_first, largest, rank_and_world, summed
    from cifar_gradcam.training import Trainer
    recipe,data = lesson(c)
    rank,world = rank_and_world()
    def steps(parallel): # the `Trainer` after three steps
        t = Trainer(recipe, data, device=c.device)
        if parallel and world == 1: t.parallel = DistributedDataParallel(t.net)
        t.net.train()
        for x,y in islice(t.batches(16, 3), 3): t.step(x, y)
        return t
    t,total = steps(parallel=True),torch.ones(2, device=c.device)
    dist.barrier()
    dist.all_reduce(total)
    found = dict(rank=rank, backend=dist.get_backend(), world=world, total=total.tolist(), losses=t.history.batch_loss,
                 parallel=type(t.parallel).__name__, largest=largest(rank, c.device), first=from_first(rank, c.device),
                 summed=summed(torch.ones(1, device=c.device)).item())
    if world == 1: return found | weights_off(t.net, steps(parallel=False).net)
    weights = torch.cat([p.detach().flatten() for p in t.net.parameters()])
    top,low = weights.clone(),-weights
    for w in (top, low): dist.all_reduce(w, dist.ReduceOp.MAX)
    return found | dict(apart=float((top+low).abs().max()))

@check('A', 20)
def one_process(c):
    "`torchrun` with one process, over NCCL on a GPU: the steps of `DistributedDataParallel` are the plain ones"
    found = together(c, 1, 'own')
    right = (found['backend'] == ('nccl' if c.cuda else 'gloo') and found['off'] <= 1e-4
             and found['parallel'] == 'DistributedDataParallel' and found['total'] == [1,1])
    return found | dict(failed=[] if right else ['steps'])

# How fast

def prepared(c, n, batch_size):
    "n batches in memory, as a `Trainer` is given them"
    from cifar_gradcam.data import loader, shapes
    from cifar_gradcam.transforms import CIFAR10_MEAN, CIFAR10_STD, train_transforms
    tfm = train_transforms(mean=CIFAR10_MEAN, std=CIFAR10_STD)
    return [*loader(shapes('train', n*batch_size), tfm, batch_size)]

def plain_steps(c, batches):
    "A loop as in a tutorial, whose data cost nothing: channels first, float32, SGD; yields images"
    import torch
    import torch.nn.functional as F
    from cifar_gradcam.model import resnet18
    model = resnet18().to(c.device)
    optimizer = torch.optim.SGD(model.parameters(), .01, momentum=.9, weight_decay=5e-4)
    for x,y in cycle(batches):
        x,y = x.to(c.device),y.to(c.device)
        loss = F.cross_entropy(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()
        yield len(y)

def our_steps(c, batches, amp, muon):
    "A `Trainer` whose data cost nothing; yields images"
    from cifar_gradcam.data import shapes
    from cifar_gradcam.training import Recipe, Trainer
    n = len(batches[0][1])
    recipe = Recipe('check', sizes=(32,), lr=.01, muon_lr=.01*muon, schedule='constant', batch_size=n)
    t = Trainer(recipe, shapes('train', n), device=c.device, amp=amp)
    t.net.train()
    for x,y in cycle(batches):
        t.step(x, y)
        yield n

@check('A', 15)
def steps_alone(c):
    "Images/s of training steps at 32 px whose data cost nothing: a plain loop beside ours"
    from cifar_gradcam.benchmark import take_turns
    from cifar_gradcam.model import count_flop, resnet18
    batches = prepared(c, 1 if c.small else 8, 16 if c.small else 256)
    entrants = {'plain, float32': plain_steps(c, batches), 'ours, float32': our_steps(c, batches, False, False),
                'ours, 16 bits': our_steps(c, batches, True, False),
                'ours, 16 bits, Muon': our_steps(c, batches, True, True)}
    def say(line): pass
    rates = take_turns(entrants, 1 if c.small else 3, .1 if c.small else .8, say)
    gflop = count_flop(resnet18(), backward=True)/1e9
    return dict(gflop_of_an_image=gflop, images_per_second={k: r.median for k,r in rates.items()},
                times_plain={k: r.median/rates['plain, float32'].median for k,r in rates.items()},
                tflop_per_second={k: r.median*gflop/1e3 for k,r in rates.items()})

def watched(c, recipe, train, n_workers, seconds):
    "Train for a while: images/s, and which share of the time the device waits for a batch"
    from cifar_gradcam.training import Trainer
    t = Trainer(recipe, train, device=c.device, n_workers=n_workers)
    t.net.train()
    start = time.monotonic()
    batches = iter(t.batches(32, t.ends[-1]))
    t.step(*next(batches)) # it warms up
    c.wait()
    begun = before = time.monotonic()
    waited = n = 0
    while n < 2 or before-begun < seconds:
        try: x,y = next(batches)
        except StopIteration: break
        waited += time.monotonic()-before
        t.step(x, y)
        c.wait()
        before,n = time.monotonic(),n+len(y)
    return dict(images_per_second=n/(before-begun), share_waiting=waited/(before-begun), first_batch_s=begun-start)

@check('A', 25)
def waiting(c):
    "How long the device waits for batches, by the number of processes that prepare them; the quickest is kept"
    from cifar_gradcam.data import shapes
    from cifar_gradcam.training import RECIPES
    try: train,_ = c.cifar10()
    except NotReached: train = shapes('train', 512 if c.small else 6000)
    change = dict(network='tiny', batch_size=64) if c.small else {}
    recipe = replace(RECIPES['fast'], sizes=(32,), epochs=(1 if len(train) > 6000 else 8,), **change)
    numbers = (0,1) if c.small else sorted({0, 4, 8, min(12, max(1, (os.cpu_count() or 2)-2))})
    found = {n: watched(c, recipe, train, n, .5 if c.small else 4) for n in numbers}
    best = max(found, key=lambda n: found[n]['images_per_second'])
    (STORE/'workers.json').write_text(json.dumps(best))
    return dict(by_workers=found, best=best)

def small_recipe(c, recipe):
    "The recipe, or where all is small one for a tiny network"
    if not c.small: return recipe
    if recipe.network == 'narrow': return replace(recipe, batch_size=64) # it is small, and its trials need its blocks
    return replace(recipe, network='tiny', batch_size=64)

def of_seed(part, seconds, name, seed, least=0):
    "A recipe from a seed, on all training images; evaluated once, at the end of each stage"
    def run(c):
        from cifar_gradcam.training import RECIPES, fit
        train,test = c.cifar10()
        recipe = small_recipe(c, replace(RECIPES[name], seed=seed))
        start = time.monotonic()
        t = fit(recipe, train, test, device=c.device, n_workers=c.workers)
        last = t.history.epochs[-1]
        found = dict(accuracy=last['test_accuracy'], seconds_of_training=last['seconds'], pflop=last['pflop'],
                     seconds_with_evaluation=time.monotonic()-start, workers=c.workers)
        return found | dict(failed=[] if c.small or last['test_accuracy'] >= least else ['accuracy'])
    run.__name__ = f'{name}_seed_{seed}'
    return check(part, seconds)(run)

for seed in (0,1,2): of_seed('A', 15, 'fast', seed, least=85)

@check('A', 25)
def project_benchmark(c):
    "`cifar-gradcam benchmark`, briefly: its loops prepare their own batches, in one process"
    from cifar_gradcam.benchmark import benchmark
    def say(line): pass
    print(b := benchmark(1 if c.small else 2, .01 if c.small else .6, device=c.device, n_images=512, say=say))
    return dict(images_per_second={r.name: r.median for r in b.training},
                times_plain={r.name: b.speedup(r.name) for r in b.training},
                tflop_per_second_of_matrices={r.name: r.median/1e12 for r in b.peaks})

@check('A', 20)
def two_processes(c):
    "Two processes that share the device, over Gloo: one network"
    found = together(c, 2, 'gloo')
    right = (found['parallel'] == 'DistributedDataParallel' and found['apart'] == 0 and found['total'] == [2,2]
             and found['largest'] == 1 and found['summed'] == 2 and found['first'] == 0)
    return found | dict(failed=[] if right else ['steps'])

# Part B: a long training

def in_stages(recipe, epochs):
    "The same steps in longer stages, so that there are fewer evaluations and checkpoints between"
    same = [(size, len([*group])) for size,group in groupby(recipe.sizes)] # a recipe of one epoch for each stage
    stages = [(size, epochs) for size,n in same for _ in range(n//epochs)]
    if epochs*len(stages) != len(recipe.sizes): raise ValueError(f'{recipe.name} has no stages of {epochs} epochs')
    return replace(recipe, sizes=[s for s,_ in stages], epochs=[e for _,e in stages])

def write_pieces(path, out):
    "A file in pieces that are small enough to go back"
    data = Path(path).read_bytes()
    for k in range(math.ceil(len(data)/PIECE)):
        (out/f'{Path(path).name}.{k+1}').write_bytes(data[k*PIECE:(k+1)*PIECE])

def join(folder):
    "Put the pieces of every model together again, and see that each can be loaded; give the trials to their page"
    from cifar_gradcam.model import load_model
    for first in sorted(Path(folder).glob('*.safetensors.1')):
        whole = first.with_suffix('')
        pieces = sorted(whole.parent.glob(f'{whole.name}.[0-9]*'), key=lambda p: int(p.suffix[1:]))
        whole.write_bytes(b''.join(p.read_bytes() for p in pieces))
        print(f'{whole}: {whole.stat().st_size:,} bytes, {load_model(whole).info.metrics}')
    lines = [json.loads(line) for path in Path(folder).glob('results.jsonl') for line in path.read_text().splitlines()]
    trials = {line['name']: {k: line[name] for name,k in OF_TRIAL.items()}
              for line in lines if line['status'] == 'passed' and OF_TRIAL.keys() <= line.keys()}
    file = PAGE.with_suffix('.json')
    if trials: file.write_text(json.dumps(json.loads(file.read_text()) | trials, indent=1))
    print(f'{len(trials)} trials for {file}')

def trained(c, recipe):
    "Train to the end or until the time is over, and write weights and history; resumes what an earlier call began"
    from cifar_gradcam.model import save_model
    from cifar_gradcam.training import Stopped, Trainer, evaluate, fit
    train,test = c.cifar10()
    folder,last = STORE/'runs'/f"{recipe.name}{'-small'*c.small}",5 if c.small else 25 # seconds for what comes after it
    with stopping_after(c, c.left()-last):
        try: t = fit(recipe, train, test, folder, device=c.device, n_workers=c.workers)
        except Stopped:
            t = Trainer(recipe, train, test, folder, device=c.device)
            t.resume()
    loss,accuracy = evaluate(t.model, test, t.info)
    seconds = t.sums['seconds'] + (t.history.epochs[-1]['seconds'] if t.history.epochs else 0)
    found = dict(place=t.place, accuracy=accuracy, loss=loss, seconds_of_training=seconds, steps=t.n_steps,
                 workers=c.workers)
    info = replace(t.info, metrics=t.info.metrics | dict(test_accuracy=accuracy, steps=t.n_steps))
    save_model(t.model, STORE/f'{recipe.name}.safetensors', info, half=True)
    write_pieces(STORE/f'{recipe.name}.safetensors', c.out)
    t.history.save(c.out/f'{recipe.name}_history.json')
    return found if t.finished else found | dict(why='it is not finished: call this again')

@check('B', 60)
def full(c):
    "Recipe `full`, in stages of eight epochs"
    from cifar_gradcam.training import RECIPES
    return trained(c, small_recipe(c, in_stages(RECIPES['full'], 8)))

@check('B', 60)
def evening(c):
    "Recipe `evening`"
    from cifar_gradcam.training import RECIPES
    if 'evening' not in RECIPES: raise NotReached('there is no such recipe yet')
    return trained(c, small_recipe(c, RECIPES['evening']))

# Part C: what helps? The trials of the page on ablations, on 45,000 images, with 5,000 held out

PAGE = PROJECT/'nbs/studies/ablations.ipynb'
OF_TRIAL = {k: k for k in ('recipe','accuracy','loss','train_accuracy','pflop','precision')} # name here -> name there
OF_TRIAL |= {'seconds_of_training': 'seconds'} # a check's own 'seconds' are all that it took

def of_page(path=PAGE, name='pairs'):
    """What a notebook defines, up to the last cell that sets `name`.
    Cells that wait for a flag, as the trials themselves do, stay out"""
    cells = [''.join(cell['source']) for cell in json.loads(path.read_text())['cells'] if cell['cell_type'] == 'code']
    last = max(k for k,text in enumerate(cells) if re.search(rf'^{name} \|?= ', text, re.M))
    defined,before = {},Path.cwd()
    os.chdir(path.parent)
    try:
        for text in cells[:last+1]:
            if re.search(r'^#\| ablations|get_ipython', text, re.M): continue
            exec(compile(text, path.name, 'exec'), defined)
    finally: os.chdir(before)
    return defined

def trial_of(page, key):
    def run(c):
        from cifar_gradcam.data import holdout
        recipe,prepare = page['pairs'][key]
        train,held = holdout(c.cifar10()[0], 100 if c.small else 5000)
        row = page['trial'](small_recipe(c, recipe), prepare, train, held, device=c.device, n_workers=c.workers)
        return {name: row[k] for name,k in OF_TRIAL.items()}
    run.__name__ = key
    return check('C', 25)(run)

def add_trials():
    page = of_page()
    for key in [k for k in page['pairs'] if k not in page['results']]: trial_of(page, key)

# Part D: the seeds of the recipes, for the table of results

for seed in range(3): of_seed('D', 60, 'strong', seed, least=92) # the longer ones first
for seed in range(10): of_seed('D', 15, 'fast', seed, least=85)

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--part', choices=CHECKS, nargs='+', metavar='PART',
                   help='A: right and fast? B: a long training; C: trials of tricks; D: recipes by seeds; none: unpack')
    p.add_argument('--packed', default=PROJECT/'build/gpu', help="folder of gpu_pack.py's parts (%(default)s)")
    p.add_argument('--out', default=PROJECT/'build/gpu/out', help='folder for what goes back (%(default)s)')
    p.add_argument('--minutes', type=float, help='time for all of it (A: 4, B: 6, C and D: 9; the sum)')
    p.add_argument('--processes', type=int, default=1, help='that share the device, each at a check of its own (1); '
                   'for B, C and D some four')
    p.add_argument('--small', action='store_true', help='few images and a tiny network, to try this script')
    p.add_argument('--device', default='cuda', help='where to compute (%(default)s)')
    p.add_argument('--join', metavar='FOLDER', help='put the weights that came back there together, and check them')
    for internal in ('--worker','--claims'): p.add_argument(internal, help=argparse.SUPPRESS)
    a = p.parse_args()
    os.environ |= dict(NO_ALBUMENTATIONS_UPDATE='1', TQDM_DISABLE='1', MPLBACKEND='agg')
    start = time.monotonic()
    if not (a.worker or a.join or a.claims): keep_parts(a.packed)
    install_lacking()
    sys.path.insert(0, str(PROJECT))
    if a.join: return join(a.join)
    if a.worker: return worker(a.worker, a.device, a.small, a.out)
    if not a.part:
        try: print(*unpacked(), sep='\n')
        except NotReached as e: print(e)
        return
    from cifar_gradcam.training import pick_device
    minutes = (a.minutes or sum(dict(A=4, B=6, C=9, D=9)[part] for part in a.part)) - (time.monotonic()-start)/60
    c = Context(a.part, pick_device(a.device), a.small, a.out, minutes, a.claims, a.processes)
    if a.processes > 1 and not a.claims: counts = side_by_side(c, minutes)
    else:
        if 'C' in a.part: add_trials()
        counts = run_all(c)
    if not a.claims:
        print(f"{counts['passed']} passed, {counts['failed']} failed, {counts['not reached']} not reached", flush=True)
    sys.exit(counts['failed'] > 0)

if __name__ == '__main__': main()
