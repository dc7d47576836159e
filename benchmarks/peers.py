"""Peers that can take part on this machine, and the reasons why the others cannot."""

import torch

from fastcov.bench import Setting, peers


def main() -> None:
    """Start of every peer, once, with one printed line on each."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    setting = Setting(torch.device(kind), "tiny")
    found = []
    for name, start_moment in {**peers.MOMENT_PEERS, **peers.COMPILED_MOMENT_PEERS}.items():
        maker = peers.find(setting, name, lambda start=start_moment: start(setting.device))
        if maker is not None:
            found.append(f"{name}: running second moments")
    for name, start_solver in peers.EIGENVALUE_PEERS.items():
        solver = peers.find(setting, name, lambda start=start_solver: start(setting.device))
        if solver is not None:
            found.append(f"{name}: eigenvalues")
    print("\n".join(found))
    for name, reason in setting.missing.items():
        print(f"missing: {name}: {reason}")


if __name__ == "__main__":
    main()
