//! The flavours with privileged instructions, entered by PVH. `unaware` has emulated devices and
//! knows of no VMM; `hybrid` is the same kernel, with virtio drivers.

use crate::{
    console::{FLAVOUR, Terminal},
    cpu, crash,
    devices::Devices,
    memory::{self, ARENA_PHYSICAL, Physical},
    nano::Machine,
    spaces,
    start_info::StartInfo,
    traps,
};
use programs::session::{self, Console, LINE, Next};

/// Interrupt mask registers of the two PICs.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];

/// First Rust code, called by asm/entry.s.
#[unsafe(no_mangle)]
extern "C" fn kernel_start(start_info: u64) -> ! {
    traps::set_up();
    // Firmware may have left the PICs open, at vectors that are exceptions.
    for port in PIC_MASKS {
        cpu::port_out(port, 0xff);
    }
    memory::map_devices();
    let mut console = Terminal::set_up();
    let info = match StartInfo::read(&Physical, start_info, ARENA_PHYSICAL) {
        Ok(info) => info,
        Err(reason) => fail(console, reason),
    };
    memory::protect();
    let words = match memory::map_user(info.usable_end) {
        Ok(words) => words,
        Err(reason) => fail(console, reason),
    };
    spaces::set_up();
    let mut machine = Machine {
        words,
        // SAFETY: this function is entered once.
        devices: unsafe { Devices::new() },
    };
    session::greet(&mut console, FLAVOUR);
    let ordered = session::answer_command_line(&mut console, &mut machine, info.command_line());
    let code = match ordered {
        Some(ran) => u8::from(!ran),
        None => serve(&mut console, &mut machine),
    };
    console.flush();
    crash::exit(code)
}

/// Answers lines until `quit`; returns its code.
fn serve(console: &mut Terminal, machine: &mut Machine) -> u8 {
    let mut buffer = [0; LINE];
    loop {
        match console.line(&mut buffer) {
            None => session::fail(console, "a line is longer than 256 bytes"),
            Some(line) => match session::answer(console, machine, line) {
                Next::Go { ran: _ } => {}
                Next::Quit(code) => return code,
            },
        }
    }
}

fn fail(mut console: Terminal, reason: &str) -> ! {
    session::fail(&mut console, reason);
    console.flush();
    crash::exit(1)
}
