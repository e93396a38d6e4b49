//! The seccomp filters of K and U: the whole of what their processes may ask of the host.
//!
//! Each party has two, of which the more restrictive answer counts (seccomp(2)): the first turns
//! numbers that are no system calls of the host into notifications, and is installed with a
//! listener; the second is the jail. They are apart because the listener has to be handed over in
//! between.
//!
//! K's jail, 7 host calls: `ioctl` (two notification requests, one descriptor), `read` (wake
//! descriptor), `write` (bell), `timerfd_settime` (timer), `pidfd_send_signal` (SIGUSR1 to the
//! guest's own user processes), `sched_yield`, `rt_sigreturn`.
//! U's jail, 4 host calls, all from the gate's page only and with the process's key: `mmap` (shared,
//! fixed, below 2^46, the one descriptor), `mprotect` and `munmap` (below 2^46), `rt_sigreturn`.
//! Everything else is ENOSYS, and so is everything from another architecture's entry.
//!
//! An argument that the kernel takes as an int is compared in its low half, which is what the kernel
//! looks at. The other half, in the fourth and fifth argument of U's calls, is where the key stands:
//! 62 random bits that the jail of each user process has in its code and the gate gets from K (see
//! stub/gate.s). Both halves of the key are compared before either decides, so that the time of a
//! refusal tells nothing about one of them.

use abi::hypercall::layout::{MAX_SPACES, USER_END};

use crate::wire::{FILTER, Filter, gate, k_fd, u, u_fd, vmm};

/// Offsets in `struct seccomp_data`.
mod at {
    pub(super) const NUMBER: u32 = 0;
    pub(super) const ARCH: u32 = 4;
    pub(super) const IP: u32 = 8;

    pub(super) const fn argument(index: u32) -> u32 {
        16 + 8 * index
    }
}

const AUDIT_ARCH_X86_64: u32 = 0xc000_003e;
const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const NOTIFY: u32 = libc::SECCOMP_RET_USER_NOTIF;
const DENY: u32 = libc::SECCOMP_RET_ERRNO | libc::ENOSYS as u32;

/// A filter under construction.
#[derive(Debug, Default)]
struct Program(Vec<u64>);

/// What an operand must be.
#[derive(Clone, Copy, Debug)]
enum Must {
    /// Exactly this.
    Be(u32),
    /// One of these.
    BeOneOf(&'static [u32]),
    /// At least the first and below the second.
    LieIn(u32, u32),
    /// None of these bits.
    LackBits(u32),
}

impl Program {
    fn push(&mut self, code: u32, jump_true: u8, jump_false: u8, operand: u32) {
        let instruction = u64::from(code)
            | u64::from(jump_true) << 16
            | u64::from(jump_false) << 24
            | u64::from(operand) << 32;
        self.0.push(instruction);
    }

    fn load(&mut self, offset: u32) {
        self.push(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0, offset);
    }

    fn answer(&mut self, action: u32) {
        self.push(libc::BPF_RET | libc::BPF_K, 0, 0, action);
    }

    fn jump(&mut self, test: u32, jump_true: u8, jump_false: u8, operand: u32) {
        self.push(
            libc::BPF_JMP | test | libc::BPF_K,
            jump_true,
            jump_false,
            operand,
        );
    }

    /// Denies unless the word at `offset` is what it must be.
    fn require(&mut self, offset: u32, must: Must) {
        self.load(offset);
        match must {
            Must::Be(value) => self.jump(libc::BPF_JEQ, 1, 0, value),
            Must::BeOneOf(values) => {
                for (index, &value) in values.iter().enumerate() {
                    // Over the rest of the list and the denial.
                    let rest = (values.len() - index) as u8;
                    self.jump(libc::BPF_JEQ, rest, 0, value);
                }
            }
            Must::LieIn(from, to) => {
                self.jump(libc::BPF_JGE, 0, 1, from);
                self.jump(libc::BPF_JGE, 0, 1, to);
            }
            Must::LackBits(bits) => self.jump(libc::BPF_JSET, 0, 1, bits),
        }
        self.answer(DENY);
    }

    fn compute(&mut self, operation: u32, source: u32, operand: u32) {
        self.push(libc::BPF_ALU | operation | source, 0, 0, operand);
    }

    /// Denies unless the high halves of the fourth and fifth argument are the key; answers with the
    /// places of the key's halves.
    fn require_key(&mut self) -> [u64; 2] {
        let mut places = [0; 2];
        self.load(at::argument(3) + 4);
        places[0] = self.0.len() as u64;
        self.compute(libc::BPF_XOR, libc::BPF_K, 0);
        self.push(libc::BPF_MISC | libc::BPF_TAX, 0, 0, 0);
        self.load(at::argument(4) + 4);
        places[1] = self.0.len() as u64;
        self.compute(libc::BPF_XOR, libc::BPF_K, 0);
        self.compute(libc::BPF_OR, libc::BPF_X, 0);
        self.jump(libc::BPF_JEQ, 1, 0, 0);
        self.answer(DENY);
        places
    }

    /// The start of every filter: the accumulator holds the call's number afterwards.
    fn start() -> Self {
        let mut program = Program::default();
        program.require(at::ARCH, Must::Be(AUDIT_ARCH_X86_64));
        program.load(at::NUMBER);
        program
    }

    /// Numbers from `first` to below `end` end in `action`.
    fn range(&mut self, first: u64, end: u64, action: u32) {
        self.jump(libc::BPF_JGE, 0, 2, first as u32);
        self.jump(libc::BPF_JGE, 1, 0, end as u32);
        self.answer(action);
    }

    /// Call `number` is allowed with operands that are what they must be.
    fn allow(&mut self, number: libc::c_long, operands: &[(u32, Must)]) {
        let mut body = Program::default();
        for &(offset, must) in operands {
            body.require(offset, must);
        }
        body.answer(ALLOW);
        self.jump(libc::BPF_JEQ, 0, body.0.len() as u8, number as u32);
        self.0.append(&mut body.0);
    }

    fn finish(mut self, otherwise: u32) -> Filter {
        self.answer(otherwise);
        let mut program = [0; FILTER];
        program[..self.0.len()].copy_from_slice(&self.0);
        Filter {
            length: self.0.len() as u64,
            program,
        }
    }
}

/// The filter that makes K's calls of V notifications.
pub(crate) fn kernel_calls() -> Filter {
    let mut program = Program::start();
    program.range(vmm::SPACE_CREATE, vmm::END, NOTIFY);
    program.finish(ALLOW)
}

/// K's jail.
pub(crate) fn kernel_jail() -> Filter {
    use Must::{Be, BeOneOf, LieIn};
    /// SECCOMP_IOCTL_NOTIF_RECV, _SEND.
    const REQUESTS: &[u32] = &[0xc050_2100, 0xc018_2101];
    let fd = |number: i32| (at::argument(0), Be(number as u32));
    let processes = k_fd::PROCESS as u32;
    let mut program = Program::start();
    program.range(vmm::SPACE_CREATE, vmm::END, ALLOW);
    program.allow(
        libc::SYS_ioctl,
        &[fd(k_fd::LISTENER), (at::argument(1), BeOneOf(REQUESTS))],
    );
    program.allow(libc::SYS_write, &[fd(k_fd::BELL)]);
    program.allow(libc::SYS_read, &[fd(k_fd::WAKE)]);
    program.allow(libc::SYS_timerfd_settime, &[fd(k_fd::TIMER)]);
    program.allow(
        libc::SYS_pidfd_send_signal,
        &[
            (
                at::argument(0),
                LieIn(processes, processes + MAX_SPACES as u32),
            ),
            (at::argument(1), Be(libc::SIGUSR1 as u32)),
        ],
    );
    program.allow(libc::SYS_sched_yield, &[]);
    program.allow(libc::SYS_rt_sigreturn, &[]);
    program.finish(DENY)
}

/// The filter that makes U's guest system calls, and the gate's, notifications of K.
pub(crate) fn user_calls() -> Filter {
    let mut program = Program::start();
    program.range(gate::FIRST, gate::END, NOTIFY);
    program.finish(ALLOW)
}

/// U's jail, and the instructions whose operands are the low and the high half of the process's key.
/// Without a key, which a control of the attack tests wants, those are 0.
pub(crate) fn user_jail(with_key: bool) -> (Filter, [u64; 2]) {
    use Must::{Be, BeOneOf, LackBits, LieIn};
    const FLAGS: &[u32] = &[
        (libc::MAP_SHARED | libc::MAP_FIXED) as u32,
        (libc::MAP_SHARED | libc::MAP_FIXED | libc::MAP_POPULATE) as u32,
    ];
    const RIGHTS: u32 = (libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC) as u32;
    let high = |index| at::argument(index) + 4;
    let below_end = (high(0), LieIn(0, (USER_END >> 32) as u32));
    let from_gate = [
        (at::IP + 4, Be((u::GATE >> 32) as u32)),
        (
            at::IP,
            LieIn(u::GATE as u32, (u::GATE + u::GATE_SIZE) as u32),
        ),
    ];
    let gated = |operands: &[(u32, Must)]| [&from_gate, operands].concat();
    let mut program = Program::start();
    program.range(gate::FIRST, gate::END, ALLOW);
    let mut key = [0; 2];
    if with_key {
        key = program.require_key();
        program.load(at::NUMBER);
    }
    program.allow(libc::SYS_rt_sigreturn, &gated(&[]));
    program.allow(
        libc::SYS_munmap,
        &gated(&[below_end, (high(1), LieIn(0, (USER_END >> 32) as u32))]),
    );
    program.allow(
        libc::SYS_mprotect,
        &gated(&[
            below_end,
            (high(1), LieIn(0, 1 << 8)),
            (high(2), Be(0)),
            (at::argument(2), LackBits(!RIGHTS)),
        ]),
    );
    program.allow(
        libc::SYS_mmap,
        &gated(&[
            below_end,
            (high(1), LieIn(0, 1 << 8)),
            (high(2), Be(0)),
            (at::argument(2), LackBits(!RIGHTS)),
            (at::argument(3), BeOneOf(FLAGS)),
            (at::argument(4), Be(u_fd::RAM as u32)),
        ]),
    );
    (program.finish(DENY), key)
}

/// A filter that allows everything, for controls of attack tests.
#[cfg(feature = "testing")]
pub(crate) fn open(calls: Filter) -> Filter {
    let mut open = calls;
    open.program = [0; FILTER];
    let mut program = Program::default();
    program.answer(ALLOW);
    open.program[0] = program.0[0];
    open.length = 1;
    open
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A system call as a filter sees it.
    #[derive(Clone, Copy)]
    struct Data {
        number: u32,
        arch: u32,
        ip: u64,
        arguments: [u64; 6],
    }

    impl Data {
        fn word(&self, offset: u32) -> u32 {
            let half = |value: u64, high: bool| (if high { value >> 32 } else { value }) as u32;
            match offset {
                0 => self.number,
                4 => self.arch,
                8 | 12 => half(self.ip, offset == 12),
                _ => {
                    let index = (offset - 16) / 8;
                    half(self.arguments[index as usize], (offset - 16) % 8 == 4)
                }
            }
        }
    }

    /// What the kernel's interpreter makes of it (Documentation/networking/filter.rst).
    fn judge(filter: &Filter, data: &Data) -> u32 {
        let mut accumulator = 0;
        let mut index = 0;
        let mut at = 0;
        loop {
            let instruction = filter.program[..filter.length as usize][at];
            let operand = (instruction >> 32) as u32;
            let (yes, no) = (
                (instruction >> 16 & 0xff) as usize,
                (instruction >> 24 & 0xff) as usize,
            );
            let code = (instruction & 0xffff) as u32;
            at += 1;
            let test = |holds: bool| if holds { yes } else { no };
            match code & 7 {
                libc::BPF_LD => accumulator = data.word(operand),
                libc::BPF_RET => return operand,
                libc::BPF_MISC => index = accumulator,
                libc::BPF_ALU => match code & 0xf8 {
                    libc::BPF_XOR => accumulator ^= operand,
                    code if code == libc::BPF_OR | libc::BPF_X => accumulator |= index,
                    other => panic!("computes {other:#x}"),
                },
                _ => {
                    at += match code & 0xf0 {
                        libc::BPF_JEQ => test(accumulator == operand),
                        libc::BPF_JGE => test(accumulator >= operand),
                        libc::BPF_JSET => test(accumulator & operand != 0),
                        other => panic!("jump {other:#x}"),
                    };
                }
            }
        }
    }

    fn call(number: i64, arguments: [u64; 6]) -> Data {
        Data {
            number: number as u32,
            arch: AUDIT_ARCH_X86_64,
            ip: u::GATE + 0x100,
            arguments,
        }
    }

    const KEY: u64 = 0x1234_5678_9abc_def0;

    /// The jail of a process that has drawn [`KEY`], as the stub makes it.
    fn jail() -> Filter {
        let (mut filter, key) = user_jail(true);
        filter.program[key[0] as usize] |= KEY << 32;
        filter.program[key[1] as usize] |= KEY >> 32 << 32;
        filter
    }

    fn with_key(mut data: Data) -> Data {
        data.arguments[3] |= KEY << 32;
        data.arguments[4] |= KEY >> 32 << 32;
        data
    }

    fn map() -> Data {
        with_key(call(libc::SYS_mmap, [0x10000, 4096, 7, 0x11, 0, 0]))
    }

    #[test]
    fn the_gate_may_map_the_descriptor_below_the_end_and_nothing_else() {
        let filter = jail();
        assert_eq!(judge(&filter, &map()), ALLOW);
        let mut ahead = map();
        ahead.arguments[3] |= 0x8000;
        assert_eq!(judge(&filter, &ahead), ALLOW);
        type Change = fn(&mut Data);
        let wrong: &[(&str, Change)] = &[
            ("address", |data| data.arguments[0] = USER_END),
            ("length", |data| data.arguments[1] = 1 << 40),
            ("rights", |data| data.arguments[2] = 8),
            ("rights, high half", |data| data.arguments[2] = 1 << 32),
            ("private", |data| data.arguments[3] ^= 3),
            ("anonymous", |data| data.arguments[3] |= 0x20),
            ("descriptor", |data| data.arguments[4] |= 4),
            ("low half of the key", |data| data.arguments[3] ^= 1 << 32),
            ("high half of the key", |data| data.arguments[4] ^= 1 << 63),
            ("no key", |data| {
                data.arguments[3] = 0x11;
                data.arguments[4] = 0;
            }),
            ("halves that differ from the key's alike", |data| {
                data.arguments[3] ^= 1 << 40;
                data.arguments[4] ^= 1 << 40;
            }),
            ("from below the gate", |data| data.ip = u::GATE - 1),
            ("from above the gate", |data| {
                data.ip = u::GATE + u::GATE_SIZE
            }),
            ("from elsewhere", |data| data.ip = 0x10_0000),
            ("another entry", |data| data.arch = 0x4000_0003),
            ("x32", |data| data.number |= 0x4000_0000),
        ];
        for (name, change) in wrong {
            let mut data = map();
            change(&mut data);
            assert_eq!(judge(&filter, &data), DENY, "{name}");
        }
    }

    #[test]
    fn every_host_call_outside_the_lists_is_denied() {
        let kernel = [0, 1, 15, 16, 24, 286, 424];
        let user = [9, 10, 11, 15];
        for number in 0..1024 {
            // Descriptors and flags that no list names.
            let data = call(number, [u64::MAX; 6]);
            let free = [15, 24];
            let expected = if free.contains(&number) { ALLOW } else { DENY };
            assert_eq!(judge(&kernel_jail(), &data), expected, "{number}");
            assert_eq!(judge(&jail(), &data), DENY, "{number}");
            // Whatever the arguments are.
            if !kernel.contains(&number) {
                assert_eq!(judge(&kernel_jail(), &call(number, [0; 6])), DENY);
            }
            if !user.contains(&number) {
                assert_eq!(judge(&jail(), &with_key(call(number, [0; 6]))), DENY);
            }
        }
    }

    #[test]
    fn every_call_of_the_gate_takes_the_key() {
        let (open, places) = user_jail(false);
        assert_eq!(places, [0; 2]);
        for number in [libc::SYS_rt_sigreturn, libc::SYS_munmap, libc::SYS_mprotect] {
            let bare = call(number, [0x10000, 4096, 0, 0, 0, 0]);
            assert_eq!(judge(&jail(), &bare), DENY, "{number}");
            assert_eq!(judge(&jail(), &with_key(bare)), ALLOW, "{number}");
            assert_eq!(judge(&open, &bare), ALLOW, "{number}");
            let mut far = with_key(bare);
            far.ip = 0x10_0000;
            assert_eq!(judge(&jail(), &far), DENY, "{number}");
        }
        for number in [libc::SYS_munmap, libc::SYS_mprotect] {
            let gate = with_key(call(number, [u::GATE, 4096, 0, 0, 0, 0]));
            assert_eq!(judge(&jail(), &gate), DENY, "{number}");
        }
    }

    #[test]
    fn the_kernel_may_signal_its_own_processes_only() {
        let filter = kernel_jail();
        let signal = |fd, signal| call(libc::SYS_pidfd_send_signal, [fd, signal, 0, 0, 0, 0]);
        assert_eq!(judge(&filter, &signal(64, 10)), ALLOW);
        assert_eq!(judge(&filter, &signal(127, 10)), ALLOW);
        for (fd, number) in [(63, 10), (128, 10), (64, 9), (4, 10)] {
            assert_eq!(judge(&filter, &signal(fd, number)), DENY, "{fd} {number}");
        }
    }

    #[test]
    fn only_numbers_of_the_protocol_notify() {
        for (filter, range) in [
            (user_calls(), 0x5000..0x6000),
            (kernel_calls(), 0x6000..0x6007),
        ] {
            for number in 0x4f00..0x6100 {
                let expected = if range.contains(&number) {
                    NOTIFY
                } else {
                    ALLOW
                };
                assert_eq!(
                    judge(&filter, &call(number, [0; 6])),
                    expected,
                    "{number:#x}"
                );
            }
        }
    }
}
