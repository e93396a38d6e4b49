//! The 8259s against their data sheet.

use super::*;

const COMMAND: [u64; 2] = [0, 2];
const DATA: [u64; 2] = [1, 3];

fn get(pics: &mut Pics, offset: u64) -> u8 {
    let mut data = [0xff];
    pics.read(offset, &mut data);
    data[0]
}

fn set(pics: &mut Pics, offset: u64, value: u8) {
    pics.write(offset, &[value]);
}

/// As a PC's kernel sets them up: vectors 0x20 and 0x28, nothing masked.
fn initialised(icw4: u8) -> Pics {
    let mut pics = Pics::default();
    for index in 0..2 {
        set(&mut pics, COMMAND[index], 0x11);
        for word in [0x20 + 8 * index as u8, [4, 2][index], icw4] {
            set(&mut pics, DATA[index], word);
        }
        assert_eq!(get(&mut pics, DATA[index]), 0, "unmasked by ICW1");
    }
    pics
}

#[test]
fn nothing_comes_before_initialisation() {
    let mut pics = Pics::default();
    for irq in 0..16 {
        pics.set_line(irq, true);
    }
    assert!(!pics.output());
}

#[test]
fn edges_are_latched_once_and_wait_for_eoi() {
    let mut pics = initialised(1);
    pics.set_line(0, true);
    pics.set_line(0, false);
    assert!(pics.output());
    assert_eq!(get(&mut pics, 0), 1, "IRR");
    assert_eq!(pics.acknowledge(), 0x20);
    assert!(!pics.output());
    set(&mut pics, 0, 0x0b);
    assert_eq!(get(&mut pics, 0), 1, "ISR");
    // The line stays high: no second request, but the next edge waits.
    pics.set_line(0, true);
    assert!(!pics.output());
    set(&mut pics, 0, 0x20);
    assert!(pics.output());
    assert_eq!(pics.acknowledge(), 0x20);
    set(&mut pics, 0, 0x20);
    pics.set_line(0, true);
    assert!(!pics.output());
}

#[test]
fn lower_numbers_win_and_the_slave_ranks_as_two() {
    let mut pics = initialised(1);
    for irq in [3, 9, 14, 1, 8] {
        pics.set_line(irq, true);
    }
    let mut order = Vec::new();
    while pics.output() {
        let vector = pics.acknowledge();
        order.push(vector);
        if vector >= 0x28 {
            set(&mut pics, 2, 0x20);
        }
        set(&mut pics, 0, 0x20);
    }
    assert_eq!(order, [0x21, 0x28, 0x29, 0x2e, 0x23]);
}

#[test]
fn a_higher_request_of_the_slave_waits_unless_nesting_is_special() {
    for (icw4, nests) in [(0x01, false), (0x11, true)] {
        let mut pics = initialised(icw4);
        pics.set_line(14, true);
        assert_eq!(pics.acknowledge(), 0x2e);
        pics.set_line(8, true);
        assert_eq!(pics.output(), nests);
        // Ended at the slave and the master, it comes either way.
        set(&mut pics, 2, 0x20);
        set(&mut pics, 0, 0x20);
        assert_eq!(pics.acknowledge(), 0x28);
    }
}

#[test]
fn levels_follow_their_line_and_vanish_with_it() {
    let mut pics = initialised(1);
    set(&mut pics, 5, 0xff);
    assert_eq!(get(&mut pics, 5), CHOOSABLE[1]);
    pics.set_line(11, true);
    assert_eq!(pics.acknowledge(), 0x2b);
    set(&mut pics, 2, 0x20);
    set(&mut pics, 0, 0x20);
    assert!(pics.output(), "still high");
    pics.set_line(11, false);
    assert!(!pics.output());
    // Acknowledged too late: the default interrupt, with nothing in service.
    assert_eq!(pics.acknowledge(), 0x27);
    set(&mut pics, 0, 0x0b);
    assert_eq!(get(&mut pics, 0), 0);
}

#[test]
fn masks_hold_requests_back_and_special_mask_lets_lower_ones_in() {
    let mut pics = initialised(1);
    set(&mut pics, 1, 0b0000_0010);
    pics.set_line(1, true);
    assert!(!pics.output());
    set(&mut pics, 1, 0);
    assert_eq!(pics.acknowledge(), 0x21);
    pics.set_line(5, true);
    assert!(!pics.output());
    set(&mut pics, 0, 0x68);
    set(&mut pics, 1, 0b0000_0010);
    assert_eq!(pics.acknowledge(), 0x25);
    set(&mut pics, 0, 0x48);
    // A specific EOI of a masked input.
    set(&mut pics, 0, 0x61);
    set(&mut pics, 0, 0x0b);
    assert_eq!(get(&mut pics, 0), 1 << 5);
}

#[test]
fn priorities_rotate() {
    let mut pics = initialised(1);
    pics.set_line(3, true);
    pics.acknowledge();
    // Rotate on non-specific EOI: 3 is the lowest now.
    set(&mut pics, 0, 0xa0);
    pics.set_line(3, false);
    pics.set_line(3, true);
    pics.set_line(4, true);
    assert_eq!(pics.acknowledge(), 0x24);
    set(&mut pics, 0, 0x20);
    // Set priority: 7 is the lowest again.
    set(&mut pics, 0, 0xc7);
    pics.set_line(4, false);
    pics.set_line(4, true);
    assert_eq!(pics.acknowledge(), 0x23);
}

#[test]
fn automatic_eoi_leaves_nothing_in_service() {
    let mut pics = initialised(3);
    pics.set_line(1, true);
    assert_eq!(pics.acknowledge(), 0x21);
    pics.set_line(5, true);
    assert_eq!(pics.acknowledge(), 0x25);
    set(&mut pics, 0, 0x0b);
    assert_eq!(get(&mut pics, 0), 0);
}

#[test]
fn a_poll_acknowledges() {
    let mut pics = initialised(1);
    set(&mut pics, 0, 0x0c);
    assert_eq!(get(&mut pics, 0), 0);
    pics.set_line(6, true);
    set(&mut pics, 0, 0x0c);
    assert_eq!(get(&mut pics, 0), 0x86);
    assert!(!pics.output());
    set(&mut pics, 0, 0x0b);
    assert_eq!(get(&mut pics, 0), 1 << 6);
}

#[test]
fn a_single_controller_takes_three_words() {
    let mut pics = Pics::default();
    set(&mut pics, 0, 0x13);
    set(&mut pics, 1, 0x40);
    set(&mut pics, 1, 0x01);
    set(&mut pics, 1, 0xfb);
    assert_eq!(get(&mut pics, 1), 0xfb);
}
