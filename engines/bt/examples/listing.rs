//! Boots the unaware image with a command line and prints every translated block whose guest
//! address lies in a range: guest instructions, then host code.
//!
//! `cargo run --release -p bt --example listing -- 0x100000 0x102000 run fib 20 10`

use std::time::Duration;

use bt::{BtVcpu, Options};
use engine_core::{Limits, Machine, MachineOptions, Vcpu, drive};

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [start, end, command @ ..] = arguments.as_slice() else {
        eprintln!("usage: listing START END COMMAND...");
        std::process::exit(2);
    };
    let address = |text: &str| {
        u64::from_str_radix(text.trim_start_matches("0x"), 16).expect("a hexadecimal address")
    };
    let ram = engine_core::memory::create(128).expect("guest memory");
    let entry =
        engine_core::loader::load(&ram, images::unaware(), &command.join(" ")).expect("the image");
    let mut vcpu = BtVcpu::new(ram, Options::default()).expect("a vCPU");
    vcpu.set_state(&entry).expect("the entry state");
    let mut machine = Machine::new(MachineOptions::default()).expect("a machine");
    let limits = Limits {
        timeout: Some(Duration::from_secs(60)),
        max_exits: None,
    };
    let outcome = drive(&mut vcpu, &mut machine, &limits);
    println!(
        "{}{outcome:?}\n",
        String::from_utf8_lossy(machine.console())
    );
    print!("{}", vcpu.listing(address(start)..address(end)));
}
