//! Threads as ranks: the protocol is the same as between processes.

use std::path::Path;

use super::*;

const TIMEOUT: Duration = Duration::from_secs(10);

fn rendezvous(socket: &Path, rank: usize, world_size: usize) -> Rendezvous {
    Rendezvous {
        socket: socket.to_owned(),
        rank,
        world_size,
        fingerprint: "same".to_owned(),
        timeout: TIMEOUT,
    }
}

/// Runs `body` on every rank and collects what they return.
fn on_ranks<T: Send>(
    world_size: usize,
    change: impl Fn(&mut Rendezvous) + Sync,
    body: impl Fn(Result<ShmCommunicator, BackendError>) -> T + Sync,
) -> Vec<T> {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("m-rendezvous");
    std::thread::scope(|scope| {
        let ranks: Vec<_> = (0..world_size)
            .map(|rank| {
                let mut rendezvous = rendezvous(&socket, rank, world_size);
                change(&mut rendezvous);
                let body = &body;
                scope.spawn(move || body(join(&rendezvous)))
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// A small generator, so that every rank can know what the others bring.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1 << 20) as f32 - 8.0
    };
    std::iter::repeat_with(next).take(len).collect()
}

#[test]
fn sums_are_in_rank_order_and_bitwise_equal() {
    // Around the slot's size, several slots, and nothing.
    let lengths = [1, 576, SLOT_LEN - 1, SLOT_LEN, SLOT_LEN + 1, 0, 3 * SLOT_LEN + 17, 7, 2 * SLOT_LEN];
    for world_size in 2..=4 {
        on_ranks(
            world_size,
            |_| {},
            |communicator| {
                let mut communicator = communicator.unwrap();
                for (round, len) in lengths.into_iter().cycle().take(50).enumerate() {
                    let seed = |rank: usize| (round * 10 + rank) as u64;
                    let mut data = noise(seed(communicator.rank()), len);
                    communicator.all_reduce(&mut data).unwrap();
                    let mut expected = noise(seed(0), len);
                    for rank in 1..world_size {
                        for (sum, value) in expected.iter_mut().zip(noise(seed(rank), len)) {
                            *sum += value;
                        }
                    }
                    let bits = |data: &[f32]| data.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
                    assert!(bits(&data) == bits(&expected), "round {round}, {len} elements");
                }
            },
        );
    }
}

#[test]
fn gathers_uneven_columns_of_any_size() {
    let shapes: [(usize, &[usize]); 6] = [
        (1, &[3, 2, 1]),
        (5, &[64, 128, 1]),
        (3, &[SLOT_LEN + 3, 5, SLOT_LEN]),
        (1000, &[200, 150, 0]),
        (2, &[1, 1, 1]),
        (0, &[4, 4, 4]),
    ];
    on_ranks(
        3,
        |_| {},
        |communicator| {
            let mut communicator = communicator.unwrap();
            for (rows, widths) in shapes {
                let part = |rank: usize| noise(rank as u64 + 1, rows * widths[rank]);
                let row_width: usize = widths.iter().sum();
                let mut out = vec![f32::NAN; rows * row_width];
                communicator.all_gather(&part(communicator.rank()), rows, widths, &mut out).unwrap();
                let parts: Vec<_> = (0..3).map(part).collect();
                for row in 0..rows {
                    let expected: Vec<f32> = (0..3)
                        .flat_map(|rank| parts[rank][row * widths[rank]..][..widths[rank]].to_vec())
                        .collect();
                    assert_eq!(out[row * row_width..][..row_width], expected);
                }
            }
        },
    );
}

#[test]
fn one_rank_needs_nobody() {
    let mut communicator = join(&rendezvous(Path::new("/nonexistent/socket"), 0, 1)).unwrap();
    let mut data = [1.5];
    communicator.all_reduce(&mut data).unwrap();
    let mut out = [0.0];
    communicator.all_gather(&data, 1, &[1], &mut out).unwrap();
    assert_eq!(out, [1.5]);
}

#[test]
fn a_rank_that_ends_is_noticed_by_all_and_named() {
    for dying in 0..3 {
        let begin = Instant::now();
        let errors = on_ranks(
            3,
            |_| {},
            |communicator| {
                let mut communicator = communicator.unwrap();
                communicator.all_reduce(&mut [1.0]).unwrap();
                if communicator.rank() == dying {
                    return None;
                }
                Some(communicator.all_reduce(&mut [1.0]).unwrap_err().to_string())
            },
        );
        assert!(begin.elapsed() < TIMEOUT / 2, "noticed only after {:?}", begin.elapsed());
        for error in errors.into_iter().flatten() {
            assert!(error.starts_with(&format!("rank {dying} lost in all_reduce number 2: ")), "{error}");
        }
    }
}

#[test]
fn a_rank_that_hangs_is_named_after_the_time_out() {
    let shorten = |rendezvous: &mut Rendezvous| rendezvous.timeout = Duration::from_millis(300);
    let errors = on_ranks(2, shorten, |communicator| {
        let mut communicator = communicator.unwrap();
        if communicator.rank() == 1 {
            std::thread::sleep(Duration::from_millis(900));
            return None;
        }
        Some(communicator.all_reduce(&mut [1.0]).unwrap_err().to_string())
    });
    let expected = "rank 1 lost in all_reduce number 1: it did not come within 300ms";
    assert_eq!(errors[0].as_deref(), Some(expected));
}

#[test]
fn ranks_in_different_operations_are_told_so() {
    let errors = on_ranks(
        2,
        |_| {},
        |communicator| {
            let mut communicator = communicator.unwrap();
            let rank = communicator.rank();
            let mut data = vec![0.0; 4 + rank];
            (communicator.all_reduce(&mut data).unwrap_err().to_string(), communicator)
        },
    );
    assert!(errors[0].0.contains("another length"), "{}", errors[0].0);
}

#[test]
fn mismatches_are_reported_on_every_rank() {
    let change = |rendezvous: &mut Rendezvous| {
        if rendezvous.rank == 2 {
            rendezvous.fingerprint = "other".to_owned();
        }
    };
    for error in on_ranks(3, change, |communicator| communicator.unwrap_err().to_string()) {
        assert_eq!(
            error,
            "ranks do not belong together: rank 2 has 3 ranks and fingerprint \"other\", rank 0 has 3 ranks and \
             fingerprint \"same\""
        );
    }
    let twice = |rendezvous: &mut Rendezvous| rendezvous.rank = rendezvous.rank.min(1);
    for error in on_ranks(3, twice, |communicator| communicator.unwrap_err()) {
        assert!(matches!(error, BackendError::RankMismatch { rank: 1, .. }), "{error}");
    }
}

#[test]
fn a_missing_rank_is_named_on_every_rank() {
    let change = |rendezvous: &mut Rendezvous| {
        rendezvous.timeout = Duration::from_millis(300);
        rendezvous.world_size = 3;
    };
    for error in on_ranks(2, change, |communicator| communicator.unwrap_err().to_string()) {
        assert_eq!(error, "rank 2 lost in rendezvous number 0: it did not come within 300ms");
    }
}

#[test]
fn without_rank_0_the_others_give_up() {
    let folder = tempfile::tempdir().unwrap();
    let mut alone = rendezvous(&folder.path().join("nobody"), 1, 2);
    alone.timeout = Duration::from_millis(50);
    let error = join(&alone).unwrap_err().to_string();
    assert_eq!(error, "rank 0 lost in rendezvous number 0: it did not listen within 50ms");
}

#[test]
fn stale_sockets_are_replaced_live_ones_are_not() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("m-rendezvous");
    let live = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let error = join(&rendezvous(&socket, 0, 2)).unwrap_err().to_string();
    assert!(error.starts_with("listen on ") && socket.exists(), "{error}");

    drop(live);
    assert!(socket.exists());
    let pair: Vec<_> = std::thread::scope(|scope| {
        let ranks: Vec<_> =
            (0..2).map(|rank| rendezvous(&socket, rank, 2)).map(|r| scope.spawn(move || join(&r))).collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(pair.iter().all(Result::is_ok));
    assert!(!socket.exists(), "the socket goes once all are there");
}

#[test]
fn strangers_are_ignored() {
    use std::io::Write;
    use std::os::unix::fs::PermissionsExt;
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("m-rendezvous");
    std::thread::scope(|scope| {
        let host = rendezvous(&socket, 0, 2);
        let host = scope.spawn(move || join(&host));
        while !socket.exists() {
            std::thread::yield_now();
        }
        assert_eq!(socket.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let connect = || loop {
            // It has a name before it listens.
            match std::os::unix::net::UnixStream::connect(&socket) {
                Ok(stream) => return stream,
                Err(_) => std::thread::yield_now(),
            }
        };
        connect().write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        connect().write_all(b"QRTRDV01\x01\0\0\0\x02\0\0\0\xff\xff\xff\xff").unwrap();
        join(&rendezvous(&socket, 1, 2)).unwrap();
        host.join().unwrap().unwrap();
    });
}
