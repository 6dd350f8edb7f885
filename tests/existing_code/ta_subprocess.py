import subprocess
import sys

if "--worker" not in sys.argv:
    subprocess.run([sys.executable, __file__, "--worker"], check=True)
else:
    import torchattacks

    import victim

    model, images, labels = victim.load()
    victim.check(torchattacks.SmoothAdvPGD(model)(images, labels), images, 1.0)
