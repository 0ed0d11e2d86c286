"""QEMU as a machine for our guest: TCG, headless, its RAM a file that both sides map."""

import mmap
from pathlib import Path

from vapama.oracles.bare_metal import BareMetal
from vapama.oracles.departures import QEMU
from vapama.oracles.machine import RAM_BYTES, Machine

EMULATOR = "qemu-system-x86_64"


class QemuMachine(Machine):
    """QEMU with a CPU model (`max` has the most features) and MAXPHYADDR, 32 to 52."""

    name = "qemu"

    def __init__(self, model: str = "max", maxphyaddr: int = 40) -> None:
        self.model, self.maxphyaddr = model, maxphyaddr
        self._memory: mmap.mmap | None = None
        super().__init__()

    def command(self) -> list[str]:
        """QEMU's command line."""
        shared = Path("/dev/shm")
        ram = (shared if shared.is_dir() else self.folder) / f"{self.folder.name}.ram"
        with ram.open("wb") as file:
            file.truncate(RAM_BYTES)
        with ram.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), RAM_BYTES)
        self._ram = ram
        backend = f"memory-backend-file,id=ram,size={RAM_BYTES},mem-path={ram},share=on"
        return [
            EMULATOR,
            *("-machine", "pc,accel=tcg,memory-backend=ram,mem-merge=off"),
            *("-object", backend),
            *("-m", f"{RAM_BYTES >> 20}M"),
            *("-cpu", f"{self.model},phys-bits={self.maxphyaddr}"),
            *("-display", "none"),
            *("-nodefaults", "-no-user-config", "-no-reboot"),
            *("-drive", "file=guest.img,format=raw,if=ide,snapshot=on"),
        ]

    def find_memory(self) -> None:
        """Wait for the guest; then the file needs no name any more."""
        try:
            self.wait_until_ready()
        finally:
            self._ram.unlink()

    def read(self, address: int, count: int) -> bytes:
        """Bytes of RAM."""
        assert self._memory is not None
        return self._memory[address : address + count]

    def write(self, address: int, data: bytes) -> None:
        """Put bytes into RAM."""
        assert self._memory is not None
        self._memory[address : address + len(data)] = data


def qemu(model: str = "max", maxphyaddr: int = 40) -> BareMetal:
    """QEMU's TCG as a subject. Raises `CannotStart`."""
    return BareMetal(QemuMachine(model, maxphyaddr), QEMU)
