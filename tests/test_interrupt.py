import os
import signal
import subprocess
import sys
import textwrap

import pytest

from utils.interrupt import EXIT, Interrupt, Interrupted


@pytest.mark.parametrize("number", EXIT)
def test_the_first_signal_is_noted_and_handlers_come_back(number, capfd):
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        interrupt.check()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # at once: torchrun passes on what the scheduler has sent already
        assert interrupt.signal == number
        with pytest.raises(Interrupted):
            interrupt.check()
    assert signal.getsignal(number) == before
    assert f"{number.name}: the state is saved after this update" in capfd.readouterr().err


@pytest.mark.parametrize("number", EXIT)
def test_the_second_signal_ends_the_process_at_once(number):
    code = textwrap.dedent("""
        import os, signal, sys, time
        from utils.interrupt import Interrupt
        with Interrupt():
            for _ in range(2):
                os.kill(os.getpid(), int(sys.argv[1]))
                time.sleep(1.1)
            time.sleep(60)
    """)
    done = subprocess.run([sys.executable, "-c", code, str(int(number))], timeout=30, capture_output=True, text=True)
    assert done.returncode == -number and EXIT[number] == 128 + number


def test_exit_codes_are_those_of_a_shell():
    assert EXIT == {signal.SIGTERM: 143, signal.SIGINT: 130}
