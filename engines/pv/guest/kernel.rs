//! What every scenario uses: hypercalls and the console.

use crate::h::{Call, StartInfo, call, console_io, sched};

static mut INFO: Option<&'static StartInfo> = None;

pub(crate) fn init(info: &'static StartInfo) {
    unsafe { INFO = Some(info) };
}

pub(crate) fn info() -> &'static StartInfo {
    unsafe { INFO.unwrap_unchecked() }
}

pub(crate) fn hc(which: Call, arguments: [u64; 5]) -> i64 {
    unsafe { call(info().hypercall_page, which, arguments) }
}

pub(crate) fn say(text: &str) {
    hc(
        Call::ConsoleIo,
        [
            console_io::WRITE,
            text.len() as u64,
            text.as_ptr() as u64,
            0,
            0,
        ],
    );
}

pub(crate) fn shutdown(code: u64) -> ! {
    loop {
        hc(Call::SchedOp, [sched::SHUTDOWN, code, 0, 0, 0]);
    }
}
