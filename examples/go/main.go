// Faces in a folder of pictures, from Go: made of the protos alone, as for any language that has gRPC.
//
//	go mod init example.org/facelane && ./generate.sh && go mod tidy
//	go run . FOLDER
//
// Or with Debian's packages alone, as its test does: golang-go, golang-google-grpc-dev,
// protobuf-compiler, protoc-gen-go, protoc-gen-go-grpc.
//
// Streams the JPEGs of FOLDER in their order, lossless, and prints a line of JSON for each outcome and
// one for the summary. The server is FACELANE_TARGET (host:port or unix:/path), the key FACELANE_TOKEN;
// with FACELANE_CA (PEM) the connection is encrypted.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "example.org/facelane/facelane/v1"
)

const (
	fps        = 25
	maxMessage = 64 << 20
)

type line struct {
	Frame  uint64 `json:"frame"`
	Kind   string `json:"kind"`
	Reason string `json:"reason,omitempty"`
	Faces  []face `json:"faces,omitempty"`
}

type face struct {
	Track    uint64  `json:"track"`
	Decision string  `json:"decision"`
	Subject  string  `json:"subject,omitempty"`
	Live     string  `json:"live"`
	X        float32 `json:"x"`
	Width    float32 `json:"width"`
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: go run . FOLDER")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run(folder string) error {
	names, err := filepath.Glob(filepath.Join(folder, "*.jpg"))
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("no *.jpg in %s", folder)
	}
	sort.Strings(names)
	target := os.Getenv("FACELANE_TARGET")
	if target == "" {
		target = "unix:/run/facelane/grpc.sock"
	}
	conn, err := dial(target)
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	if token := os.Getenv("FACELANE_TOKEN"); token != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+token)
	}
	stream, err := pb.NewAnalysisServiceClient(conn).AnalyzeStream(ctx)
	if err != nil {
		return err
	}
	config := &pb.StreamConfig{SourceId: "go", OverloadPolicy: pb.OverloadPolicy_OVERLOAD_POLICY_LOSSLESS}
	if err := stream.Send(&pb.AnalyzeStreamRequest{Message: &pb.AnalyzeStreamRequest_Config{Config: config}}); err != nil {
		return received(stream, err)
	}
	// Sent beside receiving: a server that is full stops reading until outcomes are taken.
	sending := make(chan error, 1)
	go func() { sending <- send(stream, names) }()
	if err := receive(stream, uint64(len(names))); err != nil {
		return err
	}
	return <-sending
}

func dial(target string) (*grpc.ClientConn, error) {
	secure := grpc.WithInsecure() // insecure.NewCredentials() is newer than Debian 12's gRPC
	if ca := os.Getenv("FACELANE_CA"); ca != "" {
		trusted, err := credentials.NewClientTLSFromFile(ca, "")
		if err != nil {
			return nil, err
		}
		secure = grpc.WithTransportCredentials(trusted)
	}
	options := []grpc.DialOption{
		secure,
		grpc.WithDefaultCallOptions(
			grpc.MaxCallRecvMsgSize(maxMessage), grpc.MaxCallSendMsgSize(maxMessage), grpc.ForceCodec(codec{}),
		),
	}
	if strings.HasPrefix(target, "unix:") {
		options = append(options, grpc.WithAuthority("localhost"))
	}
	return grpc.Dial(target, options...)
}

// codec is what newer gRPCs have by themselves; Debian 12's knows messages of before protobuf's second API.
type codec struct{}

func (codec) Name() string { return "proto" }

func (codec) Marshal(message interface{}) ([]byte, error) {
	return proto.Marshal(message.(proto.Message))
}

func (codec) Unmarshal(data []byte, message interface{}) error {
	return proto.Unmarshal(data, message.(proto.Message))
}

func send(stream pb.AnalysisService_AnalyzeStreamClient, names []string) error {
	for number, name := range names {
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		frame := &pb.Frame{
			FrameId:      uint64(number + 1),
			Picture:      &pb.Picture{Encoding: pb.PictureEncoding_PICTURE_ENCODING_JPEG, Data: data},
			StreamOffset: durationpb.New(time.Duration(number) * time.Second / fps),
		}
		if err := stream.Send(&pb.AnalyzeStreamRequest{Message: &pb.AnalyzeStreamRequest_Frame{Frame: frame}}); err != nil {
			return err
		}
	}
	return stream.CloseSend()
}

// received is what the server says, where sending says no more than that it has ended.
func received(stream pb.AnalysisService_AnalyzeStreamClient, err error) error {
	if errors.Is(err, io.EOF) {
		_, err = stream.Recv()
	}
	return err
}

func receive(stream pb.AnalysisService_AnalyzeStreamClient, sent uint64) error {
	out := json.NewEncoder(os.Stdout)
	for {
		response, err := stream.Recv()
		if errors.Is(err, io.EOF) {
			return errors.New("the server ended the stream without a summary")
		}
		if err != nil {
			return err
		}
		switch message := response.Message.(type) {
		case *pb.AnalyzeStreamResponse_Outcome:
			if err := out.Encode(told(message.Outcome)); err != nil {
				return err
			}
		case *pb.AnalyzeStreamResponse_Summary:
			summary := message.Summary
			counts := map[string]uint64{
				"received": summary.Received, "results": summary.Results,
				"drops": summary.Drops, "errors": summary.Errors,
			}
			if err := out.Encode(map[string]interface{}{"summary": counts}); err != nil {
				return err
			}
			if summary.Received != sent || summary.Results+summary.Drops+summary.Errors != sent {
				return fmt.Errorf("%d frames were sent, the server counted %v", sent, counts)
			}
			return nil
		}
	}
}

func told(outcome *pb.FrameOutcome) line {
	switch body := outcome.Outcome.(type) {
	case *pb.FrameOutcome_Result:
		faces := make([]face, 0, len(body.Result.Faces))
		for _, one := range body.Result.Faces {
			faces = append(faces, face{
				one.TrackId,
				strings.TrimPrefix(one.Identity.GetDecision().String(), "DECISION_"),
				one.Identity.GetSubjectId(),
				strings.TrimPrefix(one.Liveness.GetVerdict().String(), "LIVENESS_VERDICT_"),
				one.Box.GetX(),
				one.Box.GetWidth(),
			})
		}
		return line{Frame: outcome.FrameId, Kind: "result", Faces: faces}
	case *pb.FrameOutcome_Drop:
		reason := strings.TrimPrefix(body.Drop.Reason.String(), "DROP_REASON_")
		return line{Frame: outcome.FrameId, Kind: "drop", Reason: reason}
	case *pb.FrameOutcome_Error:
		return line{Frame: outcome.FrameId, Kind: "error", Reason: body.Error.GetMessage()}
	}
	return line{Frame: outcome.FrameId, Kind: "unknown"}
}
