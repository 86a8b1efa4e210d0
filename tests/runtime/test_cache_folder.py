"""Keys of a machine: processors that compute differently have different ones."""

from fewstep.runtime.cache_folder import processor_of

GRAVITON2 = """processor\t: {core}
BogoMIPS\t: 243.75
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x3
CPU part\t: 0xd0c

"""
GRAVITON3 = """processor\t: {core}
BogoMIPS\t: 2100.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp sve i8mm bf16
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x1
CPU part\t: 0xd40

"""
XEON = """processor\t: {core}
vendor_id\t: GenuineIntel
model name\t: Intel(R) Xeon(R) Platinum
cpu MHz\t\t: {megahertz}
flags\t\t: fpu sse2 avx2 {more}
bugs\t\t: spectre_v1

"""


def test_arm_processors_differ_by_features_and_part() -> None:
    second, third = GRAVITON2.format(core=0), GRAVITON3.format(core=0)
    later = GRAVITON3.format(core=0).replace("0xd40", "0xd4f")
    assert len({processor_of(text) for text in (second, third, later)}) == 3


def test_the_clock_does_not_matter_and_instructions_do() -> None:
    plain = XEON.format(core=0, megahertz="2400.000", more="")
    boosted = XEON.format(core=0, megahertz="3700.123", more="")
    assert processor_of(plain) == processor_of(boosted)
    assert processor_of(plain) != processor_of(XEON.format(core=0, megahertz="1", more="amx_bf16"))


def test_the_order_of_cores_does_not_matter_and_their_kinds_do() -> None:
    small, big = GRAVITON2.format(core=0), GRAVITON3.format(core=1)
    assert processor_of(small + big) == processor_of(big + small)
    assert processor_of(small + big) != processor_of(small)
    assert processor_of(small) == processor_of(small + GRAVITON2.format(core=1))
