//! A TAP device from the command line to the guest and back, and one that is deleted under a running
//! guest.
//!
//! The tests run this program once more in a user and network namespace of its own, where it may
//! make devices and disturbs nobody. A host that allows no such namespace, or has no TAP devices,
//! is named and left at that.

mod support;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use engine_core::net::DEFAULT_MAC;
use engine_core::peripherals::Family;
use engine_core::testing::{Guest, end};
use iced_x86::IcedError;
use iced_x86::code_asm::*;
use programs::io::net::Peer;
use support::{Call, finish};

const NAME: &str = "trapline0";
const HOST: [u8; 4] = [10, 99, 0, 1];
const GUEST: [u8; 4] = [10, 99, 0, 2];
/// Ethertype of the workloads' frames.
const ECHO: u16 = 0x88b5;

fn checked(result: i32) -> io::Result<i32> {
    match result {
        -1 => Err(io::Error::last_os_error()),
        other => Ok(other),
    }
}

/// Runs the ignored test `name` of this program in namespaces of its own.
fn in_namespaces(name: &str) {
    let (user, group) = (rustix::process::getuid(), rustix::process::getgid());
    let maps = [
        ("/proc/self/setgroups", "deny".to_owned()),
        ("/proc/self/uid_map", format!("0 {} 1", user.as_raw())),
        ("/proc/self/gid_map", format!("0 {} 1", group.as_raw())),
    ];
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", name, "--ignored", "--nocapture"]);
    // SAFETY: system calls and writes of strings that were made before the fork. The standard
    // library's file functions allocate a path on the stack alone.
    unsafe {
        command.pre_exec(move || {
            checked(libc::unshare(libc::CLONE_NEWUSER | libc::CLONE_NEWNET))?;
            maps.iter()
                .try_for_each(|(path, text)| fs::write(path, text))
        });
    }
    match command.output() {
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stdout);
            let errors = String::from_utf8_lossy(&output.stderr);
            eprintln!("{said}{errors}");
            assert!(output.status.success(), "inside: {}", output.status);
            assert!(said.contains("1 passed"), "nothing ran inside");
        }
        Err(error) => eprintln!("skipped: no user and network namespaces here: {error}"),
    }
}

#[test]
fn frames_go_to_a_tap_device_and_come_back() {
    in_namespaces("inside_frames_go_out_and_come_back");
}

#[test]
fn a_tap_device_that_is_deleted_is_a_wire_that_is_cut() {
    in_namespaces("inside_the_device_is_deleted");
}

/// An interface's request with its name filled in.
fn request() -> libc::ifreq {
    // SAFETY: ifreq is integers and arrays, so zero is a valid value.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(NAME.bytes()) {
        *to = from as libc::c_char;
    }
    request
}

fn socket(domain: i32, kind: i32, protocol: i32) -> OwnedFd {
    // SAFETY: creates a descriptor that nobody else owns.
    unsafe {
        let fd = checked(libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol));
        OwnedFd::from_raw_fd(fd.unwrap())
    }
}

fn order(fd: &impl AsRawFd, number: libc::c_ulong, request: &libc::ifreq) -> io::Result<i32> {
    // SAFETY: requests that read an ifreq, or write within it.
    checked(unsafe { libc::ioctl(fd.as_raw_fd(), number, request) })
}

/// Every mode that this host can run.
fn modes() -> impl Iterator<Item = &'static engines::Mode> {
    engines::MODES.iter().filter(|mode| (mode.probe)().is_ok())
}

/// Makes the device and gives it an address. False if this host has none.
fn make() -> bool {
    let tun = match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(tun) => tun,
        Err(error) => {
            eprintln!("skipped: /dev/net/tun: {error}");
            return false;
        }
    };
    let mut wanted = request();
    wanted.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    order(&tun, libc::TUNSETIFF, &wanted).unwrap();
    // SAFETY: takes a number.
    checked(unsafe { libc::ioctl(tun.as_raw_fd(), libc::TUNSETPERSIST, 1) }).unwrap();
    let inet = socket(libc::AF_INET, libc::SOCK_DGRAM, 0);
    for (number, address) in [
        (libc::SIOCSIFADDR, HOST),
        (libc::SIOCSIFNETMASK, [255, 255, 255, 0]),
    ] {
        let mut wanted = request();
        let mut bytes = [0; 14];
        bytes[2..6].copy_from_slice(&address);
        wanted.ifr_ifru.ifru_addr = libc::sockaddr {
            sa_family: libc::AF_INET as u16,
            sa_data: bytes.map(|byte| byte as libc::c_char),
        };
        order(&inet, number, &wanted).unwrap();
    }
    let mut wanted = request();
    wanted.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as i16;
    order(&inet, libc::SIOCSIFFLAGS, &wanted).unwrap();
    true
}

fn index() -> i32 {
    let name = std::ffi::CString::new(NAME).unwrap();
    // SAFETY: a string that ends with zero.
    unsafe { libc::if_nametoindex(name.as_ptr()) as i32 }
}

/// Deletes the device, whoever uses it (rtnetlink(7), RTM_DELLINK).
fn delete() {
    let netlink = socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE);
    let flags = (libc::NLM_F_REQUEST | libc::NLM_F_ACK) as u16;
    let mut message = Vec::new();
    message.extend(32u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(flags.to_ne_bytes());
    message.extend([0; 8]);
    // struct ifinfomsg: family, type, index, flags, change.
    message.extend([0; 4]);
    message.extend(index().to_ne_bytes());
    message.extend([0; 8]);
    let mut file = File::from(netlink);
    file.write_all(&message).unwrap();
    let mut answer = [0; 1024];
    let count = io::Read::read(&mut file, &mut answer).unwrap();
    assert!(count >= 20);
    assert_eq!(answer[16..20], [0; 4], "RTM_DELLINK: {:?}", &answer[16..20]);
    assert_eq!(index(), 0);
}

/// Answers the workloads' frames at the other end of the device, until it is gone.
fn echo() {
    let protocol = i32::from(ECHO.to_be());
    let packets = socket(libc::AF_PACKET, libc::SOCK_RAW, protocol);
    // SAFETY: sockaddr_ll is integers and arrays; bind reads it.
    unsafe {
        let mut address: libc::sockaddr_ll = std::mem::zeroed();
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = ECHO.to_be();
        address.sll_ifindex = index();
        let size = size_of::<libc::sockaddr_ll>() as u32;
        checked(libc::bind(
            packets.as_raw_fd(),
            (&raw const address).cast(),
            size,
        ))
        .unwrap();
    }
    std::thread::spawn(move || {
        let mut file = File::from(packets);
        let mut logic = Peer::default();
        let mut frame = [0; 2048];
        while let Ok(length) = io::Read::read(&mut file, &mut frame) {
            if let Some(length) = logic.answer(&mut frame, length) {
                let _ = file.write(&frame[..length]);
            }
        }
    });
}

#[test]
#[ignore = "another test runs it in a namespace"]
fn inside_frames_go_out_and_come_back() {
    for mode in modes() {
        if !make() {
            return;
        }
        echo();
        for (name, size) in [("net_rr", 5), ("net_stream", 186)] {
            let ended = Call::with_memory(mode.name, "64")
                .args(&["--net", &format!("tap:{NAME}"), "--timeout", "25"])
                .args(&["--workload", name, "--size", &size.to_string()])
                .args(&["--iterations", "64"])
                .run();
            ended.check(0, "");
            let sum = programs::oracle(programs::find(name).unwrap(), size, 64).unwrap();
            let text = String::from_utf8_lossy(&ended.stdout).into_owned();
            let expected = format!("done {sum:016x} ");
            assert!(text.contains(&expected), "{} {name}: {text}", mode.name);
        }
        if mode.family() == Family::Emulated && matches!(mode.runs, engines::Runs::Vcpu(_)) {
            the_kernel_answers(mode.name);
        }
        delete();
    }
}

/// The host's own kernel at the other end: it answers an ARP request.
fn the_kernel_answers(mode: &str) {
    let ended = Call::new(mode)
        .image(&arp_guest())
        .args(&["--net", &format!("tap:{NAME}"), "--timeout", "20"])
        .run();
    ended.check(0, "");
    let reply = &ended.stdout;
    assert_eq!(reply[..6], DEFAULT_MAC);
    assert_eq!(reply[12..22], [8, 6, 0, 1, 8, 0, 6, 4, 0, 2]);
    assert_eq!(reply[22..28], reply[6..12], "its address");
    assert_eq!(reply[28..32], HOST);
    assert_eq!(reply[32..38], DEFAULT_MAC);
    assert_eq!(reply[38..42], GUEST);
}

/// Sends the frame at [`FRAME`] by the NE2000 and writes the first one that comes back to the console.
fn arp_guest() -> Vec<u8> {
    const FRAME: u64 = 0x40_0000;
    const BUFFER: u64 = 0x40_1000;
    let put = |asm: &mut CodeAssembler, port: u32, value: u32| -> Result<(), IcedError> {
        asm.mov(edx, port)?;
        asm.mov(eax, value)?;
        asm.out(dx, al)
    };
    let remote = |asm: &mut CodeAssembler, page: u32, command: u32| -> Result<(), IcedError> {
        let first = if command == 0x0a { 4 } else { 0 };
        for (port, value) in [(0x308, first), (0x309, page), (0x30a, 60), (0x30b, 0)] {
            put(asm, port, value)?;
        }
        put(asm, 0x300, command)?;
        asm.mov(edx, 0x310)?;
        asm.mov(ecx, 30)
    };
    let mut guest = Guest::long(|asm| {
        for (port, value) in [
            (0x300, 0x21),
            (0x30e, 0x49),
            (0x30c, 0),
            (0x301, 0x46),
            (0x302, 0x60),
            (0x303, 0x46),
            (0x307, 0xff),
            (0x300, 0x61),
            (0x307, 0x46),
        ] {
            put(asm, port, value)?;
        }
        for (port, byte) in (0x301..).zip(DEFAULT_MAC) {
            put(asm, port, byte.into())?;
        }
        put(asm, 0x300, 0x22)?;
        asm.mov(rsi, FRAME)?;
        remote(asm, 0x40, 0x12)?;
        asm.rep().outsw()?;
        for (port, value) in [(0x304, 0x40), (0x305, 60), (0x306, 0), (0x300, 0x26)] {
            put(asm, port, value)?;
        }
        let mut again = asm.create_label();
        asm.mov(edx, 0x307)?;
        asm.set_label(&mut again)?;
        asm.in_(al, dx)?;
        asm.test(al, 1)?;
        asm.je(again)?;
        asm.mov(rdi, BUFFER)?;
        remote(asm, 0x46, 0x0a)?;
        asm.rep().insw()?;
        asm.mov(edx, 0x3f8)?;
        asm.mov(rsi, BUFFER)?;
        asm.mov(ecx, 60)?;
        asm.rep().outsb()?;
        end(asm, 0)
    });
    let mut frame = vec![0xff; 6];
    frame.extend(DEFAULT_MAC);
    frame.extend([8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    frame.extend(DEFAULT_MAC);
    frame.extend(GUEST);
    frame.extend([0; 6]);
    frame.extend(HOST);
    frame.resize(60, 0);
    guest.segments.push((FRAME, frame, 60));
    guest.elf()
}

#[test]
#[ignore = "another test runs it in a namespace"]
fn inside_the_device_is_deleted() {
    for mode in modes() {
        if !make() {
            return;
        }
        echo();
        let builtin = format!("builtin:{}", mode.flavour);
        let mut call = Call::with_memory(mode.name, "64")
            .args(&["--net", &format!("tap:{NAME}"), "--timeout", "25"])
            .args(&["--image", &builtin]);
        let started = Instant::now();
        let mut child = call.start();
        let mut orders = child.stdin.take().unwrap();
        orders.write_all(b"run net_rr 5 100000000\n").unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let mut next = |wanted: &str| {
            let found = lines.find_map(|line| {
                let line = line.ok()?;
                line.starts_with(wanted).then_some(line)
            });
            found.unwrap_or_else(|| panic!("{}: no '{wanted}'", mode.name))
        };
        next("begin");
        std::thread::sleep(Duration::from_millis(200));
        delete();
        // The guest's own words for a frame that nobody answers; it lives, and so does its VMM.
        let refusal = next("failed ");
        eprintln!("{}: {refusal}", mode.name);
        orders
            .write_all(b"run alu 0 1\nrun net_rr 5 1\nquit 0\n")
            .unwrap();
        next("done ");
        next("failed ");
        drop(orders);
        let ended = finish(child, started);
        assert_eq!(ended.status.code(), Some(0), "{}: {ended:?}", mode.name);
    }
}
