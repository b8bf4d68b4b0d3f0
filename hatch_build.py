"""Hatchling's hook: a wheel of varptq holds the native core, compiled, and says where that runs.

The core is reached by ctypes, so one wheel of a machine serves every Python 3: its tag is
py3-none-PLATFORM. A compiler for another machine, named in CXX, makes that machine's wheel. Without
a compiler the wheel holds no core and one line says so; a compiler that fails stops the build.
HATCH_BUILD_NO_HOOKS=true, hatchling's own switch, leaves the core out.
"""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

# No older system is promised to work: torch's own wheels need this one.
OLDEST_GLIBC = 28
_OF_GLIBC = ("libc.", "libm.", "libpthread.", "libdl.", "librt.", "ld-linux")


def glibc_minor(library: Path) -> int | None:
    """N of the oldest glibc 2.N that can load an ELF library; None where it needs other libraries
    than glibc's, or none of them, as with musl."""
    from elftools.elf.elffile import ELFFile

    with library.open("rb") as file:
        elf = ELFFile(file)
        dynamic = elf.get_section_by_name(".dynamic")
        needed = [tag.needed for tag in dynamic.iter_tags("DT_NEEDED")]
        versions = elf.get_section_by_name(".gnu.version_r")
        if versions is None or not all(name.startswith(_OF_GLIBC) for name in needed):
            return None
        names = [entry.name for _, entries in versions.iter_versions() for entry in entries]
    minors = [int(name.split(".")[1]) for name in names if name.startswith("GLIBC_2.")]
    return max(minors, default=None)


def platform_tag(library: Path, machine: str, system: str) -> str:
    """The platform of a wheel that holds this library, e.g. "manylinux_2_34_x86_64"."""
    if system == "linux" and machine != "other":
        minor = glibc_minor(library)
        policy = "linux" if minor is None else f"manylinux_2_{max(minor, OLDEST_GLIBC)}"
        return f"{policy}_{machine}"
    if system == "macos":
        oldest = os.environ.get("MACOSX_DEPLOYMENT_TARGET") or platform.mac_ver()[0]
        return f"macosx_{oldest.split('.')[0]}_0_{machine.replace('aarch64', 'arm64')}"
    return sysconfig.get_platform().replace("-", "_").replace(".", "_")


class CoreHook(BuildHookInterface[Any]):
    """Compiles the core before a wheel is put together, and gives the wheel its tag."""

    PLUGIN_NAME = "custom"

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":  # the checkout has its own: python -m varptq.native.build
            return
        sys.path.insert(0, str(Path(self.root) / "src"))
        from varptq.errors import ConfigError
        from varptq.native import build

        try:
            command = build.compiler()
        except ConfigError as error:
            self.app.display_warning(f"this wheel of varptq holds no native core: {error}")
            return
        target = build.target_of(command)
        library = build.OBJECTS / f"wheel-{target.machine}" / build.LIBRARY.name
        library.parent.mkdir(parents=True, exist_ok=True)
        build.build(library=library)
        build_data["force_include"][str(library)] = f"varptq/native/{library.name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform_tag(library, *target)}"
