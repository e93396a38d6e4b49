//! The local APIC against the manual's words.

use super::reg::*;
use super::timer::SHORTEST_PERIOD;
use super::*;
use crate::clock::tsc;

const LVT_PERIODIC: u32 = 1 << 17;
const LVT_TSC_DEADLINE: u32 = 2 << 17;
const X2APIC: u64 = BASE.0 | 0xd00;

fn get(lapic: &mut Lapic, offset: u64) -> u32 {
    let mut data = [0xff; 4];
    lapic.read(offset, &mut data);
    u32::from_le_bytes(data)
}

fn set(lapic: &mut Lapic, offset: u64, value: u32) {
    lapic.write(offset, &value.to_le_bytes());
}

fn reset() -> (Lapic, Clock) {
    let clock = Clock::manual();
    (Lapic::new(clock.clone(), 0), clock)
}

fn enabled() -> (Lapic, Clock) {
    let (mut lapic, clock) = reset();
    set(&mut lapic, SVR, SVR_ENABLED | 0xff);
    (lapic, clock)
}

fn x2apic() -> (Lapic, Clock) {
    let (mut lapic, clock) = enabled();
    assert!(lapic.write_msr(APIC_BASE, X2APIC, 0));
    (lapic, clock)
}

fn self_ipi(lapic: &mut Lapic, vector: u8) {
    set(lapic, ICR_LOW, 0b01 << 18 | u32::from(vector));
    if let Some((target, message)) = lapic.take_sent() {
        assert_eq!((target, message.vector), (Target::Sender, vector));
        lapic.request(vector, false);
    }
}

/// Ends all service and takes what is deliverable.
fn next(lapic: &mut Lapic) -> Option<u8> {
    while lapic.in_service.highest().is_some() {
        lapic.end_of_interrupt();
    }
    let vector = lapic.deliverable()?;
    lapic.acknowledge(vector);
    Some(vector)
}

#[test]
fn reset_state_is_disabled_and_masked_but_for_the_8259s() {
    let (mut lapic, _) = reset();
    assert_eq!(get(&mut lapic, VERSION), 0x0005_0014);
    assert_eq!(get(&mut lapic, SVR), 0xff);
    assert_eq!(get(&mut lapic, LVT_TIMER), LVT_MASKED);
    assert_eq!(get(&mut lapic, LVT_LINT0), DELIVERY_EXTINT);
    assert!(lapic.takes_external());
    self_ipi(&mut lapic, 0x40);
    assert!(!lapic.request(0x40, false));
    assert_eq!(lapic.deliverable(), None);
    set(&mut lapic, LVT_LINT0, DELIVERY_EXTINT | LVT_MASKED);
    assert!(!lapic.takes_external());
}

#[test]
fn higher_vectors_preempt_and_lower_ones_wait_for_eoi() {
    let (mut lapic, _) = enabled();
    self_ipi(&mut lapic, 0x40);
    self_ipi(&mut lapic, 0x51);
    assert_eq!(lapic.deliverable(), Some(0x51));
    lapic.acknowledge(0x51);
    assert_eq!(get(&mut lapic, ISR + 0x20), 1 << 0x11);
    assert_eq!(get(&mut lapic, PPR), 0x50);
    assert_eq!(lapic.deliverable(), None);
    self_ipi(&mut lapic, 0x60);
    assert_eq!(lapic.deliverable(), Some(0x60));
    lapic.acknowledge(0x60);
    set(&mut lapic, EOI, 0);
    set(&mut lapic, EOI, 0);
    assert_eq!(lapic.deliverable(), Some(0x40));
}

#[test]
fn task_priority_blocks_and_follows_cr8() {
    let (mut lapic, _) = enabled();
    self_ipi(&mut lapic, 0x40);
    lapic.sync_task_priority(4);
    assert_eq!(get(&mut lapic, TPR), 0x40);
    assert_eq!(lapic.deliverable(), None);
    assert!(lapic.held_by_task_priority());
    set(&mut lapic, TPR, 0x3f);
    assert!(!lapic.held_by_task_priority());
    assert_eq!(lapic.take_priority_write(), Some(3));
    assert_eq!(lapic.deliverable(), Some(0x40));
    lapic.sync_task_priority(3);
    assert_eq!(get(&mut lapic, TPR), 0x3f);
}

#[test]
fn a_one_shot_timer_fires_once() {
    let (mut lapic, clock) = enabled();
    set(&mut lapic, DIVIDE, 0b0001);
    set(&mut lapic, LVT_TIMER, 0x30);
    set(&mut lapic, INITIAL_COUNT, 1000);
    assert_eq!(lapic.deadline(), Some(4000));
    clock.set(3000);
    lapic.advance(3000);
    assert_eq!(lapic.deliverable(), None);
    assert_eq!(get(&mut lapic, CURRENT_COUNT), 250);
    clock.set(4000);
    lapic.advance(4000);
    assert_eq!(next(&mut lapic), Some(0x30));
    assert_eq!(lapic.deadline(), None);
    assert_eq!(get(&mut lapic, CURRENT_COUNT), 0);
    assert_eq!(get(&mut lapic, INITIAL_COUNT), 1000);
}

#[test]
fn a_periodic_timer_keeps_its_phase_and_loses_what_the_host_slept_through() {
    let (mut lapic, clock) = enabled();
    set(&mut lapic, DIVIDE, 0b1011);
    set(&mut lapic, LVT_TIMER, 0x30 | LVT_PERIODIC);
    set(&mut lapic, INITIAL_COUNT, 100_000);
    clock.set(130_000);
    lapic.advance(130_000);
    assert_eq!(next(&mut lapic), Some(0x30));
    assert_eq!(lapic.deadline(), Some(200_000));
    clock.set(1_000_000);
    lapic.advance(1_000_000);
    assert_eq!(next(&mut lapic), Some(0x30));
    assert_eq!(lapic.deadline(), Some(1_000_000));
    // A period of nothing leaves the guest some time.
    set(&mut lapic, INITIAL_COUNT, 1);
    assert_eq!(lapic.deadline(), Some(1_000_000 + SHORTEST_PERIOD));
}

#[test]
fn a_masked_timer_needs_no_host_timer_and_requests_nothing() {
    let (mut lapic, clock) = enabled();
    set(&mut lapic, DIVIDE, 0b1011);
    set(&mut lapic, LVT_TIMER, 0x30 | LVT_MASKED);
    set(&mut lapic, INITIAL_COUNT, 1000);
    assert_eq!(lapic.deadline(), None);
    clock.set(5000);
    set(&mut lapic, LVT_TIMER, 0x30);
    assert_eq!(lapic.deadline(), None);
    lapic.advance(5000);
    assert_eq!(lapic.deliverable(), None);
}

#[test]
fn a_tsc_deadline_fires_once_reads_zero_then_and_never_comes_early() {
    let (mut lapic, _) = enabled();
    // Not in this mode.
    assert!(lapic.write_msr(TSC_DEADLINE, u64::MAX, tsc()));
    assert_eq!(lapic.read_msr(TSC_DEADLINE), Some(0));
    set(&mut lapic, LVT_TIMER, 0x33 | LVT_TSC_DEADLINE);
    set(&mut lapic, INITIAL_COUNT, 5);
    assert_eq!(get(&mut lapic, INITIAL_COUNT), 0);
    // A guest whose counter is not the host's.
    const OFFSET: u64 = 1 << 40;
    let due = tsc() + OFFSET + 200_000;
    assert!(lapic.write_msr(TSC_DEADLINE, due, tsc() + OFFSET));
    assert_eq!(lapic.read_msr(TSC_DEADLINE), Some(due));
    assert!(lapic.deadline().is_some_and(|ns| ns > 0));
    // The machine's clock says that it is due, the counter does not.
    let mut early = 0;
    while lapic.deliverable().is_none() {
        let before = tsc() + OFFSET;
        lapic.advance(lapic.deadline().unwrap());
        if lapic.deliverable().is_none() {
            early += 1;
        } else {
            assert!(tsc() + OFFSET >= due, "{before} {due}");
        }
    }
    assert!(early > 0);
    assert_eq!(next(&mut lapic), Some(0x33));
    assert_eq!(lapic.read_msr(TSC_DEADLINE), Some(0));
    assert_eq!(lapic.deadline(), None);
    // Zero disarms, and so does leaving the mode.
    for change in [
        (|lapic| assert!(lapic.write_msr(TSC_DEADLINE, 0, 0))) as fn(&mut Lapic),
        |lapic| set(lapic, LVT_TIMER, 0x33),
    ] {
        assert!(lapic.write_msr(TSC_DEADLINE, u64::MAX, tsc()));
        assert!(lapic.deadline().is_some());
        change(&mut lapic);
        assert_eq!(lapic.deadline(), None);
    }
}

#[test]
fn divide_codes_follow_the_manual() {
    let (mut lapic, _) = enabled();
    for (code, divisor) in [
        (0b0000, 2),
        (0b0001, 4),
        (0b0010, 8),
        (0b0011, 16),
        (0b1000, 32),
        (0b1001, 64),
        (0b1010, 128),
        (0b1011, 1),
    ] {
        set(&mut lapic, DIVIDE, code);
        assert_eq!(lapic.timer.tick(), divisor);
    }
}

#[test]
fn narrow_and_misaligned_accesses_do_no_harm() {
    let (mut lapic, _) = enabled();
    lapic.write(TPR, &[0xff]);
    lapic.write(TPR + 1, &[0xff; 4]);
    assert_eq!(get(&mut lapic, TPR), 0);
    let mut wide = [0xff; 8];
    lapic.read(VERSION, &mut wide);
    assert_eq!(wide, [0x14, 0, 5, 0, 0, 0, 0, 0]);
}

#[test]
fn level_triggered_vectors_are_told_to_the_io_apic_when_they_end() {
    let (mut lapic, _) = enabled();
    assert!(lapic.request(0x41, true));
    assert!(lapic.request(0x42, false));
    assert_eq!(get(&mut lapic, TMR + 0x20), 0b10);
    for vector in [0x42, 0x41] {
        assert_eq!(lapic.deliverable(), Some(vector));
        lapic.acknowledge(vector);
        set(&mut lapic, EOI, 0);
    }
    assert_eq!(lapic.take_ended(), Some(0x41));
    assert_eq!(lapic.take_ended(), None);
}

#[test]
fn destinations_are_physical_flat_or_clustered() {
    let (mut lapic, _) = enabled();
    let to = Destination::narrow;
    set(&mut lapic, LDR, 0x22 << 24);
    for (destination, expected) in [
        (to(0, false), true),
        (to(1, false), false),
        (to(0xff, false), true),
        (to(0x20, true), true),
        (to(0x11, true), false),
    ] {
        assert_eq!(lapic.hears(destination), expected, "{destination:?}");
    }
    set(&mut lapic, DFR, 0);
    assert!(lapic.hears(to(0x23, true)));
    assert!(!lapic.hears(to(0x12, true)));
    assert!(!lapic.hears(to(0x21, true)));
}

#[test]
fn illegal_vectors_and_registers_are_recorded_and_interrupt() {
    let (mut lapic, _) = enabled();
    set(&mut lapic, LVT_ERROR, 0x66);
    self_ipi(&mut lapic, 3);
    assert_eq!(next(&mut lapic), Some(0x66));
    assert_eq!(get(&mut lapic, ESR), 0);
    assert!(lapic.request(15, false));
    set(&mut lapic, 0x3f0, 0);
    set(&mut lapic, ESR, 0);
    assert_eq!(
        get(&mut lapic, ESR),
        SEND_ILLEGAL | RECEIVE_ILLEGAL | ILLEGAL_REGISTER
    );
    set(&mut lapic, ESR, 0);
    assert_eq!(get(&mut lapic, ESR), 0);
}

#[test]
fn modes_change_only_along_the_manuals_arrows() {
    const OFF: u64 = BASE.0 | 0x100;
    const XAPIC: u64 = BASE.0 | 0x900;
    let (mut lapic, _) = enabled();
    assert_eq!(lapic.read_msr(APIC_BASE), Some(XAPIC));
    // (from, to, allowed)
    for (from, to, allowed) in [
        (XAPIC, X2APIC, true),
        (X2APIC, XAPIC, false),
        (X2APIC, OFF, true),
        (OFF, X2APIC, false),
        (OFF, OFF | 1 << 10, false),
        (OFF, XAPIC, true),
        (XAPIC, XAPIC | 1, false),
        (XAPIC, XAPIC | 1 << 40, false),
        (XAPIC, XAPIC + 0x1000, true),
        (XAPIC + 0x1000, XAPIC, true),
    ] {
        assert_eq!(lapic.read_msr(APIC_BASE), Some(from));
        assert_eq!(
            lapic.write_msr(APIC_BASE, to, 0),
            allowed,
            "{from:x} {to:x}"
        );
    }
    // Off has reset it.
    assert_eq!(get(&mut lapic, SVR), 0xff);
}

#[test]
fn x2apic_registers_are_msrs_and_the_page_is_gone() {
    let (mut lapic, _) = x2apic();
    assert_eq!(get(&mut lapic, VERSION), u32::MAX);
    for (index, value) in [
        (0x802, 0),
        (0x803, 0x0005_0014),
        (0x80d, 1),
        (0x80f, 0x1ff),
        (0x835, u64::from(DELIVERY_EXTINT)),
    ] {
        assert_eq!(lapic.read_msr(index), Some(value), "{index:#x}");
    }
    // DFR, ICR's upper half and what never was.
    for index in [0x80e, 0x831, 0x801, 0x840, 0x8ff] {
        assert_eq!(lapic.read_msr(index), None, "{index:#x}");
        assert!(!lapic.write_msr(index, 0, 0), "{index:#x}");
    }
    // Written only.
    for index in [0x80b, 0x83f] {
        assert_eq!(lapic.read_msr(index), None, "{index:#x}");
    }
    // Read only, or reserved bits.
    for (index, value) in [
        (0x802, 0),
        (0x803, 0),
        (0x80a, 0),
        (0x80d, 0),
        (0x839, 0),
        (0x808, 0x100),
        (0x80b, 1),
        (0x828, 1),
        (0x80f, 0x200),
        (0x830, 1 << 20),
        (0x832, 1 << 19),
        (0x83e, 4),
        (0x83f, 0x100),
    ] {
        assert!(!lapic.write_msr(index, value, 0), "{index:#x} {value:#x}");
    }
    // None of them in xAPIC mode.
    let (mut lapic, _) = enabled();
    assert_eq!(lapic.read_msr(0x803), None);
    assert!(!lapic.write_msr(0x808, 0, 0));
}

#[test]
fn x2apic_sends_to_itself_without_a_command() {
    let (mut lapic, _) = x2apic();
    assert!(lapic.write_msr(0x83f, 0x51, 0));
    assert_eq!(next(&mut lapic), Some(0x51));
    assert_eq!(lapic.take_sent(), None);
}

#[test]
fn an_init_keeps_mode_and_id() {
    let (mut lapic, _) = enabled();
    set(&mut lapic, ID, 7 << 24);
    self_ipi(&mut lapic, 0x40);
    lapic.init();
    assert_eq!(get(&mut lapic, ID), 7 << 24);
    assert_eq!(get(&mut lapic, SVR), 0xff);
    assert!(!lapic.has_request());
    assert_eq!(lapic.take_priority_write(), None);
    let (mut lapic, _) = x2apic();
    lapic.init();
    assert_eq!(lapic.read_msr(APIC_BASE), Some(X2APIC));
}

#[test]
fn processors_have_their_number_as_id_and_one_of_them_boots() {
    let clock = Clock::manual();
    let mut lapic = Lapic::new(clock, 5);
    assert_eq!(get(&mut lapic, ID), 5 << 24);
    assert_eq!(lapic.read_msr(APIC_BASE), Some(BASE.0 | 0x800));
    assert!(!lapic.takes_external());
    assert!(lapic.write_msr(APIC_BASE, BASE.0 | 0xc00, 0));
    assert_eq!(lapic.read_msr(0x802), Some(5));
    assert_eq!(lapic.read_msr(0x80d), Some(1 << 5));
}
