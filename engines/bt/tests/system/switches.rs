//! Faults of hardware task switches: before the switch they are the old task's, after it the new
//! one's (SDM 3A 8.3, table 8-1; 6.15 on #TS), and returns from nested tasks.
//!
//! Main task: TSS. New task: TSS_2, named by SPARE. Exceptions go to a third task through task gates,
//! which keeps what they interrupt in its TSS.

use engine_core::CpuState;

use crate::rig::{
    CODE, CS_32, DATA, End, FREE, GDT, HANDLERS, IDT, Rig, SPARE, TSS, TSS_2, TSS_SELECTOR, gate,
    system_descriptor,
};

const HANDLER_TSS: u64 = FREE + 0x1000;
const HANDLER: u16 = SPARE + 8;
/// Descriptors of a test's own.
const FIRST: u16 = SPARE + 0x10;
const SECOND: u16 = SPARE + 0x18;
const ENTRY: u64 = FREE + 0x100;
const HANDLER_STACK: u64 = 0x3_6000;
const CALL: &[u8] = &[0x9a, 0, 0, 0, 0, SPARE as u8, 0];
const JUMP: &[u8] = &[0xea, 0, 0, 0, 0, SPARE as u8, 0];
const IRET: u8 = 0xcf;

/// Places in a TSS.
const EIP: u64 = 0x20;
const EFLAGS: u64 = 0x24;
const ESP: u64 = 0x38;
const ES: u64 = 0x48;
const CS: u64 = 0x4c;
const SS: u64 = 0x50;
const DS: u64 = 0x54;
const GS: u64 = 0x5c;
const LDT: u64 = 0x60;
const NT: u32 = 1 << 14;

fn put(rig: &mut Rig, at: u64, value: u32) {
    rig.put(at, &value.to_le_bytes());
}

fn describe(rig: &mut Rig, selector: u16, descriptor: u64) {
    rig.word(GDT + u64::from(selector & !7), descriptor);
}

fn task(rig: &mut Rig, tss: u64, eip: u64, esp: u64) {
    for (at, value) in [
        (EIP, eip as u32),
        (EFLAGS, 2),
        (ESP, esp as u32),
        (CS, CS_32.into()),
        (LDT, 0),
        (0x64, 0x68 << 16),
    ] {
        put(rig, tss + at, value);
    }
    for at in [ES, SS, DS, DS + 4, GS] {
        put(rig, tss + at, DATA.into());
    }
}

/// Both tasks, and exceptions of `vector` through a task gate.
fn rig(vector: u8) -> Rig {
    let mut rig = Rig::protected();
    describe(&mut rig, SPARE, system_descriptor(0x89, TSS_2, 0x67));
    describe(
        &mut rig,
        HANDLER,
        system_descriptor(0x89, HANDLER_TSS, 0x67),
    );
    task(&mut rig, TSS_2, ENTRY, 0x3_4000);
    let handler = HANDLERS + 16 * u64::from(vector);
    task(&mut rig, HANDLER_TSS, handler, HANDLER_STACK);
    rig.word(IDT + 8 * u64::from(vector), gate(0x85, HANDLER, 0));
    rig.put(ENTRY, &[0xf4]);
    rig
}

const BUSY: u8 = 2;

#[test]
fn what_a_new_task_cannot_load_faults_in_the_new_task() {
    let absent_data = 0x00cf_1300_0000_ffff;
    let read_only = 0x00cf_9100_0000_ffff;
    let code_dpl_3 = 0x00cf_fb00_0000_ffff;
    let absent_code = 0x00cf_1b00_0000_ffff;
    let short_code = 0x0040_9b00_0000_ffff;
    let absent_ldt = system_descriptor(0x02, FREE, 0xff);
    let first = u32::from(FIRST);
    for (at, value, descriptor, vector, error) in [
        // LDT: of no kind, and not there.
        (LDT, u32::from(DATA), 0, 10, u32::from(DATA)),
        (LDT, first, absent_ldt, 10, first),
        // CS: null, data, of another privilege, not there, too short for EIP.
        (CS, 0, 0, 10, 0),
        (CS, DATA.into(), 0, 10, DATA.into()),
        (CS, first, code_dpl_3, 10, first),
        (CS, first, absent_code, 11, first),
        (CS, first, short_code, 13, 0),
        // SS: null, read-only, not there, RPL 3.
        (SS, 0, 0, 10, 0),
        (SS, first, read_only, 10, first),
        (SS, first, absent_data, 12, first),
        (SS, u32::from(DATA) | 3, 0, 10, DATA.into()),
        // DS, ES, GS: a TSS, not there, beyond the table.
        (DS, TSS_SELECTOR.into(), 0, 10, TSS_SELECTOR.into()),
        (ES, first, absent_data, 11, first),
        (GS, 0xff8, 0, 10, 0xff8),
    ] {
        for (code, next) in [(CALL, CODE + 7), (JUMP, CODE + 7)] {
            let label = format!("{at:#x} {value:#x} {vector}");
            let mut rig = rig(vector);
            rig.state.gdtr.limit = SECOND | 7;
            rig.state.gpr[3] = 0x1234;
            describe(&mut rig, FIRST, descriptor);
            put(&mut rig, TSS_2 + at, value);
            if descriptor == short_code {
                put(&mut rig, TSS_2 + EIP, 0x1_0000);
            }
            let entry = rig.read_32(TSS_2 + EIP);
            rig.bytes(code);
            assert_eq!(rig.run(), End::Vector(vector), "{label}");
            assert_eq!(rig.error(), error, "{label}");
            let calls = code == CALL;
            // The main task has been left for good.
            assert_eq!(u64::from(rig.read_32(TSS + EIP)), next, "{label}");
            assert_eq!(rig.read_32(TSS + 0x34), 0x1234, "{label}");
            let main = rig.byte(GDT + u64::from(TSS_SELECTOR) + 5);
            assert_eq!(main & BUSY != 0, calls, "{label}");
            // The new one is what the handler has interrupted, before its first instruction.
            assert_eq!(rig.byte(GDT + u64::from(SPARE) + 5), 0x8b, "{label}");
            assert_eq!(rig.read_32(HANDLER_TSS) as u16, SPARE, "{label}");
            assert_eq!(rig.read_32(TSS_2 + EIP), entry, "{label}");
            assert_eq!(rig.read_32(TSS_2 + at) as u16, value as u16, "{label}");
            let flags = rig.read_32(TSS_2 + EFLAGS);
            assert_eq!(flags & NT != 0, calls, "{label}");
            if calls {
                assert_eq!(rig.read_32(TSS_2) as u16, TSS_SELECTOR, "{label}");
            }
            assert_eq!(rig.after().tr.selector, HANDLER, "{label}");
        }
    }
}

#[test]
fn what_is_wrong_with_a_tss_itself_faults_in_the_old_task() {
    let spare = u32::from(SPARE);
    for (descriptor, vector, error) in [
        (system_descriptor(0x8b, TSS_2, 0x67), 13, spare),
        (system_descriptor(0x09, TSS_2, 0x67), 11, spare),
        (system_descriptor(0x89, TSS_2, 0x66), 10, spare),
        (system_descriptor(0x81, TSS_2, 0x2a), 10, spare),
    ] {
        for code in [CALL, JUMP] {
            let mut rig = Rig::protected();
            describe(&mut rig, SPARE, descriptor);
            task(&mut rig, TSS_2, ENTRY, 0x3_4000);
            rig.bytes(code);
            assert_eq!(rig.run(), End::Vector(vector), "{descriptor:x}");
            assert_eq!(rig.error(), error);
            let state = rig.after();
            assert_eq!(u64::from(rig.read_32(state.gpr[4] + 4)), CODE);
            assert_eq!(state.tr.selector, TSS_SELECTOR);
            assert_eq!(rig.read(GDT + u64::from(SPARE)), descriptor);
        }
    }
    // A return to what is no busy task.
    for (link, error) in [(SPARE, spare), (0, 0), (DATA, DATA.into()), (4, 4)] {
        let mut rig = rig(9);
        put(&mut rig, TSS, link.into());
        rig.state.rflags |= u64::from(NT);
        rig.bytes(&[IRET]);
        assert_eq!(rig.run(), End::Vector(10), "{link}");
        assert_eq!(rig.error(), error);
        assert_eq!(rig.after().tr.selector, TSS_SELECTOR);
    }
}

#[test]
fn a_fault_of_an_outside_events_switch_says_so() {
    // #UD through a task gate to a task whose stack can't be loaded; #TS through a third.
    let mut rig = rig(10);
    put(&mut rig, TSS_2 + SS, 0);
    put(&mut rig, TSS_2 + DS, 0xff8);
    rig.word(IDT + 8 * 6, gate(0x85, SPARE, 0));
    rig.bytes(&[0x0f, 0x0b]);
    assert_eq!(rig.run(), End::Vector(10));
    // EXT, no selector.
    assert_eq!(rig.error(), 1);
    assert_eq!(u64::from(rig.read_32(TSS + EIP)), CODE);
}

#[test]
fn a_nested_task_returns_and_goes_on_behind_its_iret() {
    let mut rig = rig(9);
    // inc eax; iret; inc ecx; iret, called three times.
    rig.put(ENTRY, &[0x40, IRET, 0x41, IRET, 0xeb, 0xfa]);
    let code: Vec<u8> = [CALL, CALL, CALL, &[0xf4]].concat();
    rig.bytes(&code);
    assert_eq!(rig.run(), End::Halt);
    let state = rig.after();
    assert_eq!(state.tr.selector, TSS_SELECTOR);
    assert_eq!(state.rflags & u64::from(NT), 0);
    // Registers are the task's own.
    assert_eq!((state.gpr[0], state.gpr[1]), (0, 0));
    assert_eq!(rig.read_32(TSS_2 + 0x28), 2);
    assert_eq!(rig.read_32(TSS_2 + 0x2c), 1);
    assert_eq!(rig.read_32(TSS_2 + EFLAGS) & NT, 0);
    // It is free again, the caller's still busy, and CR0.TS set.
    assert_eq!(rig.byte(GDT + u64::from(SPARE) + 5), 0x89);
    assert_eq!(rig.byte(GDT + u64::from(TSS_SELECTOR) + 5), 0x8b);
    assert_eq!(state.cr0 & 8, 8);
    assert_eq!(state.segments[CpuState::SS].selector, DATA);
}

/// SDM 3B 18.3.1.1, and 3C 27.3.3: the image with RF set is in the TSS where a task gate was used.
#[test]
fn a_fault_that_switches_tasks_sets_rf_in_what_it_interrupts() {
    const RF: u32 = 1 << 16;
    for (code, vector, set) in [
        (&[0x0fu8, 0x0b][..], 6, RF),
        (&[0xcc], 3, 0),
        (&[0xf1], 1, 0),
    ] {
        let mut rig = rig(vector);
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(vector), "{code:x?}");
        assert_eq!(rig.read_32(TSS + EFLAGS) & RF, set, "{code:x?}");
    }
}

/// SDM 3A 8.3: the old task is saved before the new one is loaded.
#[test]
fn a_task_that_returns_to_itself_goes_on() {
    let mut rig = rig(6);
    put(&mut rig, TSS, TSS_SELECTOR.into());
    put(&mut rig, TSS + CS, CS_32.into());
    rig.state.gpr[3] = 0x1234;
    rig.state.rflags |= u64::from(NT);
    rig.bytes(&[IRET, 0x43, 0xf4]);
    assert_eq!(rig.run(), End::Halt);
    let state = rig.after();
    assert_eq!((state.rip, state.gpr[3]), (CODE + 3, 0x1235));
    assert_eq!(state.rflags & u64::from(NT), 0);
}

/// SDM 3B 18.3.1.5: the trap is the first thing in a new task, which a fault on the way keeps from
/// beginning.
#[test]
fn a_task_that_faults_while_it_is_loaded_does_not_trap() {
    // By a call, and by an exception.
    for code in [CALL, &[0x0f, 0x0b]] {
        let mut rig = rig(10);
        put(&mut rig, TSS_2 + 0x64, 1 | 0x68 << 16);
        put(&mut rig, TSS_2 + DS, TSS_SELECTOR.into());
        rig.word(IDT + 8 * 6, gate(0x85, SPARE, 0));
        rig.bytes(code);
        assert_eq!(rig.run(), End::Vector(10), "{code:x?}");
        assert_eq!(rig.error() & !1, u32::from(TSS_SELECTOR), "{code:x?}");
    }
}
