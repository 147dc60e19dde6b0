"""Java's own HttpClient, which offers h2c with its first request."""

import shutil
import subprocess
from pathlib import Path
from typing import Final

_SOURCE: Final = """
import java.io.ByteArrayInputStream;
import java.net.URI;
import java.net.http.*;
import java.net.http.HttpRequest.BodyPublishers;
public class Ask {
    public static void main(String[] arguments) throws Exception {
        for (var body : new HttpRequest.BodyPublisher[] {
            BodyPublishers.noBody(),
            BodyPublishers.ofString("hello"),
            BodyPublishers.ofInputStream(() -> new ByteArrayInputStream("hello".getBytes())),
        }) {
            var client = HttpClient.newHttpClient();  // each with a first request, which has the offer
            for (int time = 0; time < 2; time++) {
                var request = HttpRequest.newBuilder(URI.create(arguments[0])).POST(body).build();
                var reply = client.send(request, HttpResponse.BodyHandlers.ofString());
                System.out.println(reply.statusCode() + " " + reply.body());
            }
        }
    }
}
"""


def has_java() -> bool:
    return shutil.which("java") is not None


def ask_as_java(url: str, folder: Path) -> list[str]:
    """Posts no body, one with a length and one in chunks, each twice on a client of its own. Returns statuses with bodies."""
    source = folder / "Ask.java"
    source.write_text(_SOURCE)
    done = subprocess.run(["java", str(source), url], check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()
