//! The few questions that the launcher asks the router over HTTP; a whole HTTP client would be its largest dependency.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Nothing that is asked for is longer; `/metrics` has some hundred lines of histograms.
const LONGEST_ANSWER: u64 = 4 << 20;

/// The status code of `GET path` on the router that listens on `bind`.
///
/// # Errors
/// Nobody listens, or the connection broke.
pub async fn status_of(bind: SocketAddr, path: &str) -> io::Result<String> {
    let mut stream = ask(bind, path).await?;
    // `HTTP/1.1 200` is all there is to know.
    let mut start = [0; 12];
    stream.read_exact(&mut start).await?;
    Ok(String::from_utf8_lossy(&start[9..]).into_owned())
}

/// The body of `GET path`, whatever the status.
///
/// # Errors
/// As [`status_of`].
pub async fn body_of(bind: SocketAddr, path: &str) -> io::Result<String> {
    let mut answer = Vec::new();
    ask(bind, path).await?.take(LONGEST_ANSWER).read_to_end(&mut answer).await?;
    let text = String::from_utf8_lossy(&answer);
    Ok(text.split_once("\r\n\r\n").map(|(_, body)| body.to_owned()).unwrap_or_default())
}

async fn ask(bind: SocketAddr, path: &str) -> io::Result<TcpStream> {
    let address = reachable(bind);
    let mut stream = TcpStream::connect(address).await?;
    let request = format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await?;
    Ok(stream)
}

/// "All addresses" is nothing one can connect to; the loopback is one of them.
fn reachable(bind: SocketAddr) -> SocketAddr {
    let ip = match bind.ip() {
        IpAddr::V4(ip) if ip.is_unspecified() => IpAddr::V4(Ipv4Addr::LOCALHOST),
        IpAddr::V6(ip) if ip.is_unspecified() => IpAddr::V6(Ipv6Addr::LOCALHOST),
        ip => ip,
    };
    SocketAddr::new(ip, bind.port())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unspecified_addresses_are_reached_through_the_loopback() {
        for (bind, expected) in
            [("0.0.0.0:1", "127.0.0.1:1"), ("[::]:2", "[::1]:2"), ("10.1.2.3:4", "10.1.2.3:4")]
        {
            assert_eq!(reachable(bind.parse().unwrap()), expected.parse().unwrap());
        }
    }

    #[tokio::test]
    async fn a_body_is_what_follows_the_head() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let bind = listener.local_addr().unwrap();
        let router = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = [0; 1024];
            let read = stream.read(&mut request).await.unwrap();
            assert!(request[..read].starts_with(b"GET /info HTTP/1.1\r\n"));
            stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 7\r\n\r\na\r\n\r\nbc").await.unwrap();
        });
        assert_eq!(body_of(bind, "/info").await.unwrap(), "a\r\n\r\nbc");
        router.await.unwrap();
    }
}
