//! Frames between a guest and its peer on the network: the network workloads' protocol.
//!
//! Ethernet II frames without their check sequence. All numbers but the type are little-endian:
//!
//! | offset | bytes | what |
//! |---|---|---|
//! | 0 | 6 | destination |
//! | 6 | 6 | source |
//! | 12 | 2 | [`ETHERTYPE`], big-endian as Ethernet has it |
//! | 14 | 1 | kind, see [`kind`] |
//! | 15 | 1 | number of 8-byte words of the body |
//! | 16 | 8 | sequence number |
//! | 24 | 8 each | body |
//!
//! What follows the body is padding up to [`LEAST`] and means nothing. Everybody ignores frames of
//! other types and kinds and frames that are shorter than their body says. The peer answers to the
//! frame's source address.
//!
//! | guest sends | peer answers |
//! |---|---|
//! | [`kind::ECHO`] | [`kind::ECHOED`] with the same sequence number and body |
//! | [`kind::OPEN`] | [`kind::OPENED`] with the same sequence number; its count and sum are 0 |
//! | [`kind::DATA`] | nothing: counts the frame and folds it into its sum |
//! | [`kind::CLOSE`] | [`kind::SUMMARY`] with the same sequence number; body: count, sum |
//!
//! Nothing is sent twice and nothing is acknowledged: a frame that is lost shows as an answer that
//! does not come, or as a count that is too low. The sum is `programs::io::net`'s.

/// IEEE 802's first type for local experiments.
pub const ETHERTYPE: u16 = 0x88b5;

/// Where guests send to: a locally administered address.
pub const PEER: [u8; 6] = [0x02, b'T', b'r', b'a', b'p', b'l'];

/// Bytes before the body.
pub const HEADER: usize = 24;

/// Bytes of the shortest frame (IEEE 802.3, without the check sequence).
pub const LEAST: usize = 60;

/// Bytes of the longest frame.
pub const MOST: usize = 1514;

/// Values of the kind byte.
pub mod kind {
    /// To be sent back.
    pub const ECHO: u8 = 1;
    /// What was sent back.
    pub const ECHOED: u8 = 2;
    /// A stream begins.
    pub const OPEN: u8 = 3;
    /// The peer is ready for a stream.
    pub const OPENED: u8 = 4;
    /// A frame of the stream.
    pub const DATA: u8 = 5;
    /// The stream ends.
    pub const CLOSE: u8 = 6;
    /// What arrived of the stream.
    pub const SUMMARY: u8 = 7;
}
